"""Records of refinements on real models, and the page and plots made of them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shared import ROOT, load_script

FOLDER = ROOT / "experiments" / "benchmarks" / "real"
ABOUT = {
    "model": "m",
    "method": "matgptq",
    "refine": "mix_4500",
    "seed": 0,
    "group_size": 64,
    "evaluation_dtype": "float32",
}
RESULTS: dict[str, Any] = {
    "config": {"refine": {"text": {"batch_size": 8, "sequence_length": 512}}},
    "seconds": {"quantize": 60.0, "refine": 30.0},
    "refine": {
        "steps": 10,
        "history": [{"step": step, "kl": {"2": 2.0 / (1 + step), "4": 0.1}} for step in (0, 5, 10)],
    },
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "benchmark.py")


def test_validations_have_the_tokens_and_the_seconds_so_far(benchmark: Any) -> None:
    found = benchmark.training_records(RESULTS, ABOUT)
    assert [(row["step"], row["tokens"], row["seconds"]) for row in found] == [
        (0, 0, 0.0),
        (5, 20480, 15.0),
        (10, 40960, 30.0),
    ]
    assert found[1]["kl"] == {"2": 2.0 / 6, "4": 0.1}
    assert all(row.items() >= ABOUT.items() for row in found)
    assert benchmark.training_records({"seconds": {"quantize": 60.0}}, ABOUT) == []


def test_records_of_one_refinement_replace_those_before(benchmark: Any, tmp_path: Path) -> None:
    file = tmp_path / "training" / "m.json"
    first = benchmark.training_records(RESULTS, ABOUT)
    benchmark.merge(file, first, identity=benchmark.TRAINING_IDENTITY)
    benchmark.merge(file, [first[2] | {"seconds": 1.0}], identity=benchmark.TRAINING_IDENTITY)
    assert [row["seconds"] for row in json.loads(file.read_text())] == [0.0, 15.0, 1.0]
    benchmark.merge(file, [first[2] | {"refine": "scales"}], identity=benchmark.TRAINING_IDENTITY)
    assert len(json.loads(file.read_text())) == 4


def test_the_unquantized_model_is_measured_once(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"floors": 0, "jobs": 0}

    def floors(model: Path, about: dict[str, Any], device: str) -> list[dict[str, Any]]:
        calls["floors"] += 1
        common = about | {"seed": None, "group_size": None, "text": "source", "kl": 0.0, "perplexity": 7.0}
        return [
            common | {"method": method, "bits": bits} for method, bits in (("fp32", 32), ("bf16", 16), ("fp16", 16))
        ]

    def job(model: Path, method: str, seed: int, size: int, texts: list[str], overrides: list[str]) -> dict[str, Any]:
        calls["jobs"] += 1
        assert texts == ["source", "prose"]
        return RESULTS | {"slices": [{"bits": 2, "kl": {"stdlib": 0.5}, "perplexity": {"stdlib": 9.0}}]}

    tokenizer = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(benchmark, "open_reference", lambda *_: (None, tokenizer, None))
    monkeypatch.setattr(benchmark, "floor_records", floors)
    monkeypatch.setattr(benchmark, "run_job", job)
    arguments = [
        "benchmark.py",
        "m.gguf",
        "--methods",
        "matgptq",
        "--seeds",
        "0",
        "--refine",
        "s",
        "--out",
        str(tmp_path),
    ]
    for further, measured in (([], 1), ([], 1), (["--floors"], 2)):
        monkeypatch.setattr(sys, "argv", [*arguments, *further])
        benchmark.main()
        assert calls["floors"] == measured
    assert calls["jobs"] == 3
    assert len(json.loads((tmp_path / "m.json").read_text())) == 4
    assert len(json.loads((tmp_path / "training" / "m.json").read_text())) == 3


def test_page_has_a_row_and_a_plot_of_the_refinement(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        ABOUT | {"method": method, "refine": "none", "text": "source", "bits": bits, "kl": 0.001, "perplexity": 7.5}
        for method, bits in (("fp32", 32), ("bf16", 16), ("fp16", 16))
    ]
    for refine, share in (("none", 1.0), ("mix_4500", 0.25)):
        one = {"refine": refine, "text": "source", "perplexity": 9.0, "seconds": 5.0}
        rows += [ABOUT | one | {"bits": bits, "kl": share * 2.0**-bits} for bits in (2, 3, 4, 6, 8)]
    benchmark.merge(tmp_path / "m.json", rows)
    trained = benchmark.training_records(RESULTS, ABOUT)
    only_two_bits = [row | {"seed": 1, "kl": {"2": row["kl"]["2"]}} for row in trained]
    benchmark.merge(tmp_path / "training" / "m.json", trained + only_two_bits, identity=benchmark.TRAINING_IDENTITY)
    monkeypatch.setattr(sys, "argv", ["summary.py", "--folder", str(tmp_path)])
    load_script(FOLDER / "summary.py").main()
    text = (tmp_path / "README.md").read_text()
    (row,) = [line for line in text.splitlines() if "of 4500 steps on source and prose**" in line]
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["0.0625", "0.0312", "0.0156", "0.00391", "0.000977"]
    for name in ("m.png", "m_training.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
