"""Provenance of recorded figures: commit, command, versions, machine, date."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from matquant.version import version

_PACKAGES = ("torch", "transformers", "numpy", "numba", "datasets", "hydra-core", "cupy-cuda12x", "cupy-cuda13x")


def provenance() -> dict[str, Any]:
    """Provenance of figures that are measured now.

    Returns:
        JSON-able ``commit`` and ``dirty`` (None without git), ``command``, ``versions``, ``machine``, ``date`` (UTC).
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "command": shlex.join(["python", *_arguments()]),
        "versions": versions(),
        "machine": _machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed packages that results depend on."""
    found = {"python": platform.python_version(), "matquant": version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _arguments() -> list[str]:
    """Arguments of this process; the script relative to the working directory."""
    with contextlib.suppress(ValueError):
        return [str(Path(sys.argv[0]).resolve().relative_to(Path.cwd())), *sys.argv[1:]]
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this package; None without git or a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()
    return None


def _machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPUs."""
    import psutil
    import torch

    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
