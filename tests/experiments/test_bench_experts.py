"""Benchmark of experts: a peer that fails loses nothing of the others. The kernels themselves need a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shared import ROOT, load_script

FOLDER = ROOT / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "bench_experts.py")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="peers work on a GPU")
def test_a_peer_whose_process_fails_has_its_reason_in_the_record(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PEERS", {"vllm_fp16_us": script.PEERS["vllm_fp16_us"]})
    times = script.peer_times("qwen3_moe", [1, 16])
    assert list(times) == [1, 16]
    assert all(found["vllm_fp16_us"].startswith("its process ended with status 1: ") for found in times.values())


def test_times_before_a_failure_are_kept(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("print('noise')\nprint('PEER {\"1\": 7.5}', flush=True)\nraise SystemExit('illegal access')\n")
    monkeypatch.setattr(script, "__file__", str(child))
    monkeypatch.setattr(script, "PEERS", {"a": None, "b": None})
    reason = "its process ended with status 1: illegal access"
    assert script.peer_times("mixtral", [1, 4]) == {1: {"a": 7.5, "b": 7.5}, 4: {"a": reason, "b": reason}}
