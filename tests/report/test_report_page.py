import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from matquant.report import JobResults, write, write_report
from matquant.report.html import render
from matquant.report.markup import Markup, element

HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>&lt;"


class Page(HTMLParser):
    """Tags with attributes, the text outside of styles, and that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def hostile(make_results):
    results = make_results(
        method=HOSTILE,
        model=HOSTILE,
        command=HOSTILE,
        created=HOSTILE,
        config={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0, "quantize": 2.0},
        datasets=(HOSTILE, "b"),
        allocation=True,
    )
    results["parent"] |= {"path": HOSTILE, "sha256": HOSTILE}
    for layer in results["layers"]:
        layer["name"] += HOSTILE
    results["slices"][0]["tasks"] = {HOSTILE: 0.5}
    return results


def test_shows_table_plots_command_config_versions_and_warnings(make_results, tmp_path):
    results = make_results(allocation=True, warnings=["the Hessian of layer 3 is singular"])
    path = write_report(JobResults.from_json(results), tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for words in (
        "tiny matgptq",
        "full precision",
        "allocation",
        "Quantized in 12.5 s; the parent takes 1.30 MB.",
        "the Hessian of layer 3 is singular",
        "python run.py method=matgptq",
        "group_size: 128",
        "2.13.0",
        "outputs/store/abc",
        "ab" * 32,
        "2026-11-23 21:00 UTC",
    ):
        assert words in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 3  # plots, and a heat map per width
    assert sum(tag == "input" and "checked" in attrs for tag, attrs in page.tags) == 1


def test_needs_no_network_and_no_script(make_results):
    text = render(JobResults.from_json(make_results(allocation=True)))
    page = Page(text)
    assert "http" not in re.sub(r'http-equiv="Content', "", text)
    assert "@import" not in text
    assert "url(//" not in text
    assert 'src="' not in text
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "img", "object", "embed", "base", "form"}
    meta = [attrs for tag, attrs in page.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in meta
    assert any(attrs.get("content", "").startswith("default-src 'none'") for attrs in meta)
    assert all(attrs["href"].startswith(("#", "data:")) for tag, attrs in page.tags if "href" in attrs)


def test_escapes_everything_that_comes_from_data(make_results):
    text = render(JobResults.from_json(hostile(make_results)))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<script" not in text
    assert "<img" not in text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert('x')</script>") >= 10  # shown as the text that it is


def test_ids_are_unique(make_results):
    ids = re.findall(r'\bid="([^"]*)"', render(JobResults.from_json(make_results(allocation=True))))
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_same_results_same_bytes_also_in_another_process(make_results, tmp_path):
    results = make_results(allocation=True, datasets=("stdlib", "wikitext"))
    write(JobResults.from_json(results), tmp_path)
    first = write_report(JobResults.from_json(results), tmp_path).read_bytes()
    code = "import sys; from matquant.report import *; write_report(load(sys.argv[1]), sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "report.html").read_bytes() == first


def test_bare_results_make_a_page():
    page = Page(render(JobResults.from_json({"schema": 1, "model": "bare", "method": "rtn", "slices": []})))
    assert "no slice evaluated" in page.text


def test_elements_escape_unless_told():
    assert element("p", "<a>", Markup("<b></b>"), class_='"', for_=None) == '<p class="&quot;">&lt;a&gt;<b></b></p>'
