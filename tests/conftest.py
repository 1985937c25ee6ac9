"""Shared fixtures: a small random model, and the command line in this process and in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import ForkedJob
from shared import ROOT, TINY

from matquant import machine

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads than cores are slower
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    machine.use_threads(1)

# Set before any library reads them: no test may use a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: the short tests at the end keep all workers busy to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """Random Llama of 4 blocks with the shipped tokenizer. Its hidden size is 64, half a group of 128."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def matquant(tmp_path, monkeypatch, capfd):
    """Function that calls the command line in this process; returns exit status, standard output and standard error."""
    from matquant import cli

    monkeypatch.setenv("MATQUANT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    # Hydra composes each config twice, first only to read hydra.mode, which neither conf/ nor a test sets.
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)

    def call(*overrides: str):
        folders = (f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep")
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *folders])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget graphs of ``torch.compile``, whose number per function and process is limited."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: small tensors are slower on several, and pytest has several workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job_arguments(folder: Path, overrides: tuple[str, ...]) -> list[str]:
    """Arguments of ``run.py`` with all folders inside ``folder``, unless the overrides name others."""
    folders = [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}/sweep", f"store.path={folder}/store"]
    flags = [o for o in overrides if o.startswith("-")]
    values = [o for o in overrides if not o.startswith("-")]  # the last of two values for one key applies
    return [*flags, *folders, *values]


@pytest.fixture
def run_py(tmp_path):
    """Function that starts ``python run.py`` as a process, with a store in the test's folder; returns the Popen object."""

    def start(*overrides: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *job_arguments(tmp_path, overrides)],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            # Background jobs of a shell ignore SIGINT, and their child processes inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture
def fork_job(tmp_path):
    """Function that starts a job as ``run_py`` does, in a process that has imported the packages; see ``forked``."""

    def start(*overrides: str, **environment: str) -> ForkedJob:
        return ForkedJob(job_arguments(tmp_path, overrides), tmp_path, **environment)

    return start


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, int]]:
    """Rows, those that fill row tiles included, and bit-width of each product of nested layers on the CPU so far."""
    from matquant.inference import torch_reference

    found: list[tuple[int, int]] = []
    linear = torch_reference.linear

    def counted(x, weight, bias, bits):
        found.append((weight.out_features, bits))
        return linear(x, weight, bias, bits)

    monkeypatch.setattr(torch_reference, "linear", counted)
    return found
