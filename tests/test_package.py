"""The wheel contains all files that a job needs, and runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shared import ROOT, SMALL

from matquant.version import version


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    copy_compiled(folder / "site")
    return folder / "site"


def copy_compiled(site: Path) -> None:
    """Copy numba's cache of the checkout to the same sources in ``site``: compiling them takes most of a minute.

    An entry is valid for the source's time of change.
    """
    for source in (ROOT / "matquant").rglob("*.py"):
        shutil.copystat(source, site / source.relative_to(ROOT))
    for entry in (ROOT / "matquant").rglob("__pycache__/*.nb[ic]"):
        copy = site / entry.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(entry, copy)


def test_the_wheel_contains_configs_kernels_and_the_shipped_model(unpacked_wheel):
    for name in (
        "conf/config.yaml",
        "conf/method/matgptq.yaml",
        "kernels/README.md",
        "report/page.css",
        "experiments/models/tiny/model.safetensors",
        "conf/experiment/methods.yaml",
    ):
        assert (unpacked_wheel / "matquant" / name).is_file(), name
    assert [folder.name for folder in (unpacked_wheel / "matquant" / "experiments").iterdir()] == ["models"]


@pytest.mark.slow
def test_the_installed_command_runs_the_shipped_model(unpacked_wheel, tmp_path):
    folders = (f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store", "method=rtn", "bits=4")
    run = subprocess.run(
        [sys.executable, "-m", "matquant.cli", *SMALL, *folders],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def versions(site):
    """Version in the metadata of an unpacked wheel, and the one that its package says."""
    (metadata,) = site.glob("matquant-*.dist-info")
    program = "import matquant; print(matquant.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", program], cwd=site, capture_output=True, text=True, env=environment)
    return metadata.name.removeprefix("matquant-").removesuffix(".dist-info"), run.stdout.strip()


def test_the_wheel_has_the_version_of_the_checkout(unpacked_wheel):
    assert versions(unpacked_wheel) == (version(), version())


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_has_it_too(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert versions(tmp_path / "site") == (version(), version())
