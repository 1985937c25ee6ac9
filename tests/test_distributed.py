"""One job in several processes: sharding, equality with one process, and the death of a process."""

import contextlib
import json
import os
import signal
import socket
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

# Batches of one sequence: both world sizes sum over the same batches.
JOB = (
    *SMALL,
    "method.group_size=64",
    "calibration.batch_size=1",
    "calibration.sequences=6",
    "bits=[2,8]",
    "runtime.threads=1",
)


@pytest.fixture
def fork_two(fork_job):
    """Function that runs a job in two processes, with the environment that torchrun sets."""

    def run(*overrides: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        processes = [fork_job(*overrides, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors

    return run


@pytest.fixture
def start_two(tmp_path):
    """Function that starts a job in two processes and returns the Popen object of torchrun."""

    def run(*overrides: str) -> subprocess.Popen:
        folders = [f"hydra.run.dir={tmp_path}/run", f"store.path={tmp_path}/store"]
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node=2",
                str(ROOT / "run.py"),
                *folders,
                *overrides,
            ],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


@pytest.fixture
def run_one(matquant, tmp_path):
    """Function that runs a job in this process and returns its results."""
    threads = torch.get_num_threads()

    def run(*overrides: str) -> dict:
        status, _, err = matquant(*overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    yield run
    machine.use_threads(threads)


@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 9))
def test_each_sequence_belongs_to_one_shard(count, sequences, batch_size):
    for shards in (
        [ProcessGroup(rank, count).shard_batches(sequences, batch_size) for rank in range(count)],
        [ProcessGroup(rank, count).shard(sequences) for rank in range(count)],
    ):
        sizes = [shard.stop - shard.start for shard in shards]
        assert min(sizes) >= 1
        if sequences >= count:
            assert [i for shard in shards for i in range(*shard.indices(sequences))] == list(range(sequences))


def test_collectives_of_one_process_return_their_argument():
    tensor = torch.arange(4.0)
    SINGLE_PROCESS.all_reduce(tensor)
    assert SINGLE_PROCESS.all_gather_rows(tensor, 4) is tensor
    assert tensor.tolist() == [0, 1, 2, 3]
    assert SINGLE_PROCESS.broadcast_object({"a": 1}) == {"a": 1}
    assert SINGLE_PROCESS.rank0_first(lambda: 5) == 5


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(fork_two, run_one, small_model, tmp_path):
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
    fork_two(*job)
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    one = run_one(*job, f"store.path={tmp_path}/other")
    assert one["parent"]["reused"] is two["parent"]["reused"] is False
    assert one["parent"]["sha256"] == two["parent"]["sha256"]
    assert Path(one["parent"]["path"]).name == Path(two["parent"]["path"]).name
    assert one["baseline"]["perplexity"] == pytest.approx(two["baseline"]["perplexity"], rel=1e-5)
    assert one["search"]["history"] == two["search"]["history"]
    assert [entry.get("allocation") for entry in one["slices"]] == [entry.get("allocation") for entry in two["slices"]]
    for a, b in zip(one["slices"], two["slices"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("method=rtn", "method.per_bit_models=false", "method.slicing=msb", "refine=scales"),
        ("method=matquant_qat", "refine.learning_rate=1e-3", "refine.warmup_steps=1", "objective.weights.2=10"),
    ],
    ids=["scales", "qat"],
)
def test_two_processes_refine_the_parent_of_one(method, fork_two, run_one, small_model, tmp_path):
    refine = (
        "refine.steps=4",
        "refine.validate_every=2",
        "refine.text.seed=null",
        "refine.text.sequences=8",
        "refine.text.sequence_length=32",
        "refine.text.batch_size=4",
        "refine.validation_sequences=2",
    )
    job = (*JOB, f"model.path={small_model}", *method, *refine)
    fork_two(*job)
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    one = run_one(*job, f"store.path={tmp_path}/other")
    for a, b in zip(one["refine"]["history"], two["refine"]["history"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    first, last = (one["refine"]["history"][k]["kl"]["2"] for k in (0, -1))
    # The weights learn the text, which takes a random model away from its full-precision predictions.
    assert last > 2 * first if "method=matquant_qat" in method else last < first


@pytest.mark.slow
def test_a_job_whose_process_died_resumes_with_another_world_size(start_two, run_one, small_model, tmp_path):
    job = (*JOB, f"model.path={small_model}")
    process = start_two(*job)
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
    resumed = run_one(*job, f"store.path={tmp_path}/store")["parent"]
    assert draft.name == f"parent-{Path(resumed['path']).name}"
    assert resumed["sha256"] == run_one(*job, f"store.path={tmp_path}/other")["parent"]["sha256"]


@pytest.mark.slow
def test_too_few_sequences_and_multiruns_are_rejected(matquant, small_model, monkeypatch):
    job = (*JOB, f"model.path={small_model}")
    monkeypatch.setattr(distributed, "init_distributed", lambda _: contextlib.nullcontext(ProcessGroup(0, 2)))
    status, _, err = matquant(*job, "calibration.sequences=1")
    assert status == 2
    assert "calibration.sequences=1 cannot be shared by 2 processes" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = matquant("-m", *job)
    assert status == 2
    assert "without torchrun" in err
