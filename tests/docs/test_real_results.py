"""Recorded results on real models: the pages say what the records say."""

import re
import sys

import pytest
from shared import ROOT

RESULTS = ROOT / "experiments" / "results" / "real"
IDENTITY = ("model", "method", "refine", "seed", "text", "group_size", "bits")
KEYS = {*IDENTITY, "kl", "perplexity", "evaluation_dtype", "seconds", "commit"}
ROWS = {
    "`method=matgptq`, one parent": ("matgptq", "none", "kl"),
    "with `refine=scales`": ("matgptq", "scales", "kl"),
    "with `quality=best` on source and prose": ("matgptq", "mix_4500", "kl"),
    "its perplexity (full precision 7.69)": ("matgptq", "mix_4500", "perplexity"),
    "AutoRound 0.16.1, a model per bit-width": ("auto-round 0.16.1", "none", "kl"),
    "GPTQ of llm-compressor 0.14.0.1, a model per bit-width": ("llmcompressor 0.14.0.1", "none", "kl"),
    "`method=gptq`, a model per bit-width": ("gptq", "none", "kl"),
}


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks" / "real"))
    import summary

    yield summary
    sys.modules.pop("summary")


def test_records_have_all_keys_and_each_stands_once(summary):
    for name, records in summary.read(RESULTS).items():
        assert all(set(record) >= KEYS and record["model"] == name for record in records)
        assert len({tuple(record[key] for key in IDENTITY) for record in records}) == len(records)


def test_the_page_is_made_of_the_records(summary):
    page = summary.page(*(summary.read(RESULTS / folder) for folder in ("", "ablation", "training")))
    assert (RESULTS / "README.md").read_text() == page


def test_the_table_of_changes_has_ratios_to_a_model_per_bit_width(summary):
    kls = {"none": {2: 2.0, 4: 0.08}, summary.ALONE: {2: 1.0, 4: 0.01}, "rotation": {2: 1.0, 4: 0.02}}
    records = [
        {"change": change, "text": "source", "seed": 0, "bits": bits, "kl": kl}
        for change, by_bits in kls.items()
        for bits, kl in by_bits.items()
    ]
    lines = summary.ablation_table(records, "source").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["**none**", summary.ALONE, "rotation"]
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["4.00", "1.00", "1.41"]


@pytest.mark.parametrize("title", ROWS)
def test_the_front_page_shows_the_records(title, summary):
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {title} |"))
    shown = dict(zip((2, 3, 4, 6, 8), (cell.strip() for cell in line.split("|")[2:-1]), strict=True))
    method, refine, figure = ROWS[title]
    records = summary.read(RESULTS)["smollm2-135m-instruct"]
    mine = [r for r in records if (r["method"], r["refine"], r["seed"], r["text"]) == (method, refine, 0, "source")]
    digits = 4 if figure == "perplexity" else 3
    assert shown == dict.fromkeys(shown, "") | {r["bits"]: f"{r[figure]:.{digits}g}" for r in mine}
    if "full precision" in title:
        (full,) = (r["perplexity"] for r in records if r["method"] == "fp32" and r["text"] == "source")
        assert re.search(r"full precision ([\d.]+)", title)[1] == f"{full:.3g}"
