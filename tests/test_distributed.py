"""Several processes for one job: what each gets, that they make what one makes, and what happens when one of them dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import ROOT, SMALL

from matquant import distributed, machine
from matquant.distributed import SINGLE_PROCESS, ProcessGroup

# Batches of one window, so that both processes sum over the same batches as one does.
JOB = (
    *SMALL,
    "method.group_size=64",
    "calibration.batch_size=1",
    "calibration.sequences=6",
    "bits=[2,8]",
    "runtime.threads=1",
)


@pytest.fixture
def start(tmp_path):
    """Start a job in two processes; returns the Popen object of torchrun."""

    def run(*overrides: str) -> subprocess.Popen:
        places = [f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store"]
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node=2",
                str(ROOT / "run.py"),
                *places,
                *overrides,
            ],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


@pytest.fixture
def alone(matquant, tmp_path):
    """Run a job in this process; returns its results."""
    threads = torch.get_num_threads()

    def run(*overrides: str) -> dict:
        status, _, err = matquant(*overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    yield run
    machine.use_threads(threads)


@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 9))
def test_every_window_goes_to_one_process(count, sequences, batch_size):
    for shares in (
        [ProcessGroup(rank, count).shard_batches(sequences, batch_size) for rank in range(count)],
        [ProcessGroup(rank, count).shard(sequences) for rank in range(count)],
    ):
        sizes = [share.stop - share.start for share in shares]
        assert min(sizes) >= 1
        if sequences >= count:
            assert [i for share in shares for i in range(*share.indices(sequences))] == list(range(sequences))


def test_one_process_keeps_what_it_has():
    tensor = torch.arange(4.0)
    SINGLE_PROCESS.all_reduce(tensor)
    assert SINGLE_PROCESS.all_gather_rows(tensor, 4) is tensor
    assert tensor.tolist() == [0, 1, 2, 3]
    assert SINGLE_PROCESS.broadcast_object({"a": 1}) == {"a": 1}
    assert SINGLE_PROCESS.rank0_first(lambda: 5) == 5


def test_two_processes_make_what_one_makes(start, alone, small_model, tmp_path):
    search = (
        "search.average_bits=3",
        "search.sequences=2",
        "search.sequence_length=32",
        "search.sensitivity_tokens=32",
        "search.tokens=[32,64]",
        "search.generations=2",
        "search.offspring=3",
        "search.survivors=[2,1]",
    )
    job = (*JOB, f"model.path={small_model}", *search)
    process = start(*job)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    one = alone(*job, f"store.path={tmp_path}/other")
    assert one["parent"]["reused"] is two["parent"]["reused"] is False
    assert one["parent"]["sha256"] == two["parent"]["sha256"]
    assert Path(one["parent"]["path"]).name == Path(two["parent"]["path"]).name
    assert one["baseline"]["perplexity"] == pytest.approx(two["baseline"]["perplexity"], rel=1e-5)
    assert one["search"]["history"] == two["search"]["history"]
    assert [entry.get("allocation") for entry in one["slices"]] == [entry.get("allocation") for entry in two["slices"]]
    for a, b in zip(one["slices"], two["slices"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)


def test_one_process_dies_and_another_number_goes_on(start, alone, small_model, tmp_path):
    job = (*JOB, f"model.path={small_model}")
    process = start(*job)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "store").glob("partial/parent-*/block-0001.safetensors")):
        assert time.monotonic() < deadline, "the block was never written"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    workers = [w for w in psutil.Process(process.pid).children() if w.environ().get("RANK") == "1"]
    os.kill(workers[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "inished blocks are kept" in err
    assert not (tmp_path / "run" / "results.json").exists()
    draft = next((tmp_path / "store" / "partial").glob("parent-*"))
    resumed = alone(*job, f"store.path={tmp_path}/store")["parent"]
    assert draft.name == f"parent-{Path(resumed['path']).name}"
    assert resumed["sha256"] == alone(*job, f"store.path={tmp_path}/other")["parent"]["sha256"]


def test_what_several_processes_cannot_do_is_refused(matquant, small_model, monkeypatch):
    job = (*JOB, f"model.path={small_model}")
    monkeypatch.setattr(distributed, "init_distributed", lambda _: contextlib.nullcontext(ProcessGroup(0, 2)))
    status, _, err = matquant(*job, "calibration.sequences=1")
    assert status == 2
    assert "calibration.sequences=1 cannot be shared by 2 processes" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = matquant("-m", *job)
    assert status == 2
    assert "without torchrun" in err
