import io

import pytest
from rich.console import Console

from matquant import number_format
from matquant.report import JobResults, print_table


def printed(results, width=80):
    buffer = io.StringIO()
    print_table(JobResults.from_json(results), Console(file=buffer, width=width))
    return buffer.getvalue()


def test_has_full_precision_every_slice_and_the_cost(make_results):
    text = printed(make_results(allocation=True))
    lines = text.splitlines()
    assert lines[0] == "tiny matgptq on stdlib"
    assert [line.split()[1] for line in lines if line.startswith("│")] == ["full", "2", "3", "4", "allocation"]
    assert "Quantized in 12.5 s; the parent takes 1.30 MB." in text
    assert "7.000" in text
    assert "1.00" in text
    assert "0.250" in text
    assert "0.0625" in text


def test_says_when_the_parent_was_reused(make_results):
    parent = {"bytes": 1_300_000, "reused": True}
    assert "Parent reused from the store; the parent takes 1.30 MB." in printed(make_results(parent=parent))


def test_per_bit_models_show_their_total_size(make_results):
    models = {"2": {"bytes": 1_000_000, "reused": True}, "3": {"bytes": 2_000_000, "reused": False}}
    text = " ".join(printed(make_results(parent={"bytes": 0, "models": models})).split())
    assert "(1 of 2 models reused); 2 models, one per bit-width, take 3.00 MB together." in text


def test_lists_warnings(make_results):
    assert "warning: one thing" in printed(make_results(warnings=["one thing"]))


@pytest.mark.parametrize("width", [70, 80, 200])
def test_never_wider_than_the_console(make_results, width):
    results = make_results(datasets=("stdlib", "wikitext", "c4"), allocation=True)
    for entry in results["slices"]:
        entry["tasks"] = {"arc_challenge": 0.5, "hellaswag": {"acc_norm": 0.625}}
    text = printed(results, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for word in ("stdlib", "wikitext", "c4", "arc_challenge", "0.625"):
        assert word in text
    assert "…" not in text


def test_markup_in_names_is_text(make_results):
    text = printed(make_results(model="[red]m[/]", warnings=["[bold]w[/bold] [/oops]"]))
    assert "[red]m[/]" in text
    assert "[bold]w[/bold] [/oops]" in text


def test_prints_without_unicode(make_results):
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_table(JobResults.from_json(make_results(allocation=True)), Console(file=raw, width=80))


def test_bare_results_print():
    assert "bare rtn" in printed({"schema": 1, "model": "bare", "method": "rtn", "slices": []})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2.00"),
        (0.58947, "0.589"),
        (0.0123456, "0.0123"),
        (0.00081410, "0.000814"),
        (0.000012345, "1.23e-5"),
        (123.456, "123"),
        (9.999, "10.0"),
        (1_234_567.0, "1.23e6"),
        (0, "0"),
        (-0.00002, "-2.00e-5"),
        (None, "-"),
        (float("nan"), "-"),
    ],
)
def test_significant_digits(value, text):
    assert number_format.significant(value) == text


def test_other_figures():
    assert [number_format.perplexity(v) for v in (6.9134, 50.0691, 12345.6, None)] == ["6.913", "50.07", "12350", "-"]
    assert [number_format.size(v) for v in (999, 1500, 5_812_345, 16e9)] == ["999 B", "1.50 kB", "5.81 MB", "16.0 GB"]
    assert [number_format.seconds(v) for v in (0.42, 14.23, 130, 7265)] == ["0.42 s", "14.2 s", "2.2 min", "2 h 01 min"]
    assert [number_format.average_bits(v) for v in (2.0, 3.25, 3.14159)] == ["2.0", "3.25", "3.142"]
    assert number_format.timestamp("2026-11-23T22:30:00+01:00") == "2026-11-23 21:30 UTC"
    assert number_format.timestamp("yesterday") == "yesterday"
