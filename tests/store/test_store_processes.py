"""Several processes use one store at the same time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_builds import INPUTS, Builder, digest_of

from matquant.store import Store

pytestmark = pytest.mark.slow

SCRIPT = """
import logging, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from store_builds import INPUTS, Builder
from matquant.store import Store
logging.basicConfig(level=logging.INFO, format="%(message)s")

class Slow(Builder):
    def __call__(self, draft):
        write = draft.write_tensors
        def slow(name, *rest):
            write(name, *rest)
            print("wrote", name, flush=True)
            while not Path({go!r}).exists():
                time.sleep(0.02)
        draft.write_tensors = slow
        return super().__call__(draft)

built = Store(Path({path!r})).open_or_build("parent", INPUTS, Slow())
print("reused" if built.reused else "built", built.sha256, flush=True)
"""


def start(store: Store, go: Path) -> subprocess.Popen:
    """Start a process that builds, and waits after each block until the file ``go`` exists."""
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here), path=str(store.path), go=str(go))
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_two_concurrent_processes_build_once(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path / "go")
    assert first.stdout.readline() == "wrote block_0.safetensors\n"
    second = start(store, tmp_path / "go")
    assert "Waiting for another process" in second.stderr.readline()
    (tmp_path / "go").touch()
    (built, _), (found, errors) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert [out.split()[-2] for out in (built, found)] == ["built", "reused"]
    assert built.split()[-1] == found.split()[-1]
    assert "wrote" not in found
    assert errors == ""


def test_a_killed_build_is_resumed_with_the_same_bytes(store: Store, tmp_path: Path) -> None:
    undisturbed = Store(tmp_path / "other").open_or_build("parent", INPUTS, Builder())
    process = start(store, tmp_path / "never")
    assert process.stdout.readline() == "wrote block_0.safetensors\n"
    assert store.clean() == 0  # its lock is held
    assert not (store.path / "parent").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()

    builder = Builder()
    began = time.monotonic()
    built = store.open_or_build("parent", INPUTS, builder)
    assert time.monotonic() - began < 5
    assert builder.resumed
    assert builder.made == [1, 2, 3]
    assert not built.reused
    assert digest_of(built.path) == digest_of(undisturbed.path)
    assert built.notes == []
