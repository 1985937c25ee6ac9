"""Pictures of the documentation: small, up to date where nothing was measured, and really taken from a page."""

import itertools
import re
import shutil

import pytest
from PIL import Image
from shared import ROOT, load_script

IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def pictures():
    return load_script(ROOT / "docs" / "pictures.py", "docs_pictures")


def test_the_diagram_is_what_the_script_draws(pictures):
    assert (IMAGES / "nested_format.svg").read_text() == pictures.diagram()


@pytest.mark.parametrize("code", [178, 7])
def test_cells_that_hold_a_code_lie_in_each_other(pictures, code):
    drawn = "\n".join(pictures.cells(0, 0, 256, code))
    dark = re.findall(rf'<rect x="(\S+)" y="\S+" width="(\S+)" height="\S+" fill="{pictures.READ}"', drawn)
    found = [(float(x), float(x) + float(width)) for x, width in dark]
    assert [high - low for low, high in found] == [64, 32, 16, 1]
    assert all(outer[0] <= inner[0] and inner[1] <= outer[1] for outer, inner in itertools.pairwise(found))
    assert found[-1] == (code, code + 1)


@pytest.mark.parametrize("name", sorted(path.name for path in IMAGES.iterdir()))
def test_pictures_are_small_and_shown(name):
    assert (IMAGES / name).stat().st_size < 200_000
    assert any(f"images/{name}" in page.read_text() for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(("top", "pixel"), [(0, (255, 0, 0)), (300, (0, 0, 255))])
def test_a_screenshot_shows_a_part_of_the_page(pictures, tmp_path, top, pixel):
    browser = next((found for name in pictures.BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = tmp_path / "page.html"
    page.write_text('<body style="margin: 0; background: #00f"><div style="height: 300px; background: #f00"></div>')
    shot = pictures.screenshot(page, browser, top, top + 250)
    assert isinstance(shot, Image.Image)
    assert shot.size == (pictures.WIDTH, 250)
    assert {shot.getpixel(place) for place in ((0, 0), (500, 120), (999, 249))} == {pixel}
