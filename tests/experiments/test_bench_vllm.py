"""Engines that the benchmark of vLLM starts, and its speedups; the engines themselves need a GPU."""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from shared import ROOT, load_script

FOLDER = ROOT / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "bench_vllm.py")


def given(**changes: Any) -> argparse.Namespace:
    fields: dict[str, Any] = {"model": "packed", "dense": None, "no_dense": False, "start": [4, 8], "switch": [2, 4]}
    fields |= {"batch": [1, 16], "prompt": 512, "tokens": 128, "draft": [], "draft_tokens": 3, "engine": {}}
    return argparse.Namespace(**fields | {"acceptance_length": None, "speculation": ["always"]} | changes)


def test_the_first_engine_alone_switches_to_other_bit_widths(script: Any, tmp_path: Path) -> None:
    first, second = script.jobs(given(), tmp_path)
    assert (first["bits"], first["switch"], second["bits"], second["switch"]) == (4, [2], 8, [])
    assert first["engine"]["hf_overrides"] == {"bits": 4}
    assert first["batch"] == [1, 16]


def test_the_dense_engine_comes_first_and_can_be_left_out(script: Any, tmp_path: Path) -> None:
    dense, *nested = script.jobs(given(dense="source"), tmp_path)
    assert (dense["bits"], dense["engine"]["model"], len(nested)) == (None, "source", 2)
    assert len(list(script.jobs(given(dense="source", no_dense=True), tmp_path))) == 2


@pytest.mark.parametrize("length", [None, 2.5])
def test_an_engine_that_drafts_reads_the_same_folder(script: Any, tmp_path: Path, length: float | None) -> None:
    *_, drafting = script.jobs(given(draft=[2], acceptance_length=length), tmp_path)
    speculative = drafting["engine"]["speculative_config"]
    assert (speculative["model"], drafting["bits"], drafting["draft_bits"]) == ("packed", 4, 2)
    assert speculative.get("synthetic_acceptance_length") == length


def test_an_adaptive_engine_has_the_scheduler_of_this_project(script: Any, tmp_path: Path) -> None:
    *_, always, adaptive = script.jobs(given(draft=[2], speculation=["always", "adaptive"]), tmp_path)
    assert [job["speculation"] for job in (always, adaptive)] == ["always", "adaptive"]
    assert "scheduler_cls" not in always["engine"]
    assert adaptive["engine"]["scheduler_cls"] == "matquant.vllm.scheduler.WidthScheduler"
    assert adaptive["engine"]["additional_config"]["matquant"] == {"draft_bits": 2, "speculation": "adaptive"}


@pytest.mark.parametrize(("rounds", "per_round"), [([(0, 0), (40, 60)], 2.5), ([(7, 2), (7, 2)], None)])
def test_tokens_of_a_round_are_those_of_rounds_with_drafts(
    script: Any, monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[int, int]], per_round: float | None
) -> None:
    counts = iter(rounds)
    monkeypatch.setattr(script, "rounds", lambda _: next(counts))
    monkeypatch.setattr(script, "prompts_of", lambda job, batch: ([], [{"prompt_token_ids": [1, 2]}]))
    monkeypatch.setattr(script, "generate", lambda llm, prompts, tokens: float(tokens))
    state = {"speculation": {"changes": 1}}
    llm = types.SimpleNamespace(collective_rpc=lambda name: [state])
    job = {"name": "drafts at 2", "batch": [1], "tokens": 8, "draft_bits": 2, "speculation": "adaptive"}
    (row,) = script.measure(llm, job, 4, False)
    assert (row["tokens_per_round"], row["decisions"], row["speculation"]) == (per_round, {"changes": 1}, "adaptive")


def test_a_shape_has_dummy_weights_and_a_description_of_its_layers(script: Any, tmp_path: Path) -> None:
    dense, first, _ = script.jobs(given(model="llama-8b"), tmp_path)
    assert dense["engine"]["load_format"] == first["engine"]["load_format"] == "dummy"
    assert "quantization_config" in Path(first["engine"]["model"], "config.json").read_text()
    assert "quantization_config" not in Path(dense["engine"]["model"], "config.json").read_text()


def test_an_engine_that_switches_is_measured_twice_before(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=lambda **_: "engine"))
    monkeypatch.setitem(
        sys.modules, "matquant.vllm", types.SimpleNamespace(set_bits=lambda _, bits: chosen.append(bits))
    )
    monkeypatch.setattr(script, "measure", lambda llm, job, bits, switched: [{"bits": bits, "switched": switched}])
    job = {"name": "starts at 4", "bits": 4, "engine": {}, "switch": [2]}
    rows = [row for row in script.run_engine(job) if "switched" in row]
    assert [(row["bits"], row["switched"], row.get("repeated", False)) for row in rows] == [
        (4, False, False),
        (4, False, True),
        (2, True, False),
        (4, True, False),
    ]
    assert chosen == [2, 4]
    assert len(list(script.run_engine(job | {"switch": []}))) == 1


def test_speedups_are_those_over_the_dense_engine_at_the_same_batch_size(script: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"bits": bits, "batch": batch, "decode_tokens_per_second": speed}
        for bits, batch, speed in [("float16", 1, 200.0), ("float16", 16, 3000.0), (2, 1, 300.0), (2, 16, 1500.0)]
    ]
    script.add_speedups([*rows, {"bits": 2, "switch_seconds": 1.0}])
    assert [row["speedup"] for row in rows] == [1.0, 1.0, 1.5, 0.5]


def test_an_environment_without_vllm_is_refused_before_any_work(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["bench_vllm.py", "--out", str(tmp_path / "out" / "x.json")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "vLLM is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
