"""Shared fixtures: small models made on the spot, and the command line as a user calls it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shared import ROOT, TINY

from matquant import machine

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of theirs would mostly wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    machine.use_threads(1)

# Before anything reads them: no test may look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A random Llama of 4 blocks with the shipped tokenizer: hidden 64, so that group sizes 32 and 64 fit and 128 does not."""
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
    """Call the command line in this process: returns exit status, standard output and standard error."""
    from matquant import cli

    monkeypatch.setenv("MATQUANT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(*overrides: str):
        where = (f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep")
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *where])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and pytest has workers beside this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_py(tmp_path):
    """Start ``python run.py`` as a process of its own, with a store in the test's folder; returns the Popen object."""

    def start(*overrides: str, **environment: str) -> subprocess.Popen:
        where = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep", f"store.path={tmp_path}/store"]
        flags = [o for o in overrides if o.startswith("-")]
        values = [o for o in overrides if not o.startswith("-")]  # the last of two for one key counts
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *flags, *where, *values],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            # A shell's background jobs ignore Ctrl-C, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start
