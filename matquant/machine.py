"""Devices of this machine, memory of devices and host, and room on a disk. All sizes are in bytes."""

import ctypes
import importlib.util
import os
import resource
import shutil
import sys
from pathlib import Path

import psutil
import torch

from matquant.errors import UserError

# M_MMAP_THRESHOLD of the GNU C library's <malloc.h>: larger blocks are mapped one by one, and unmapped when freed.
_MMAP_THRESHOLD = -3

# Memory limit and use of a container, in cgroups version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def device(name: str) -> torch.device:
    """Resolve ``runtime.device``; under torchrun each process of a machine gets a GPU of its own.

    Raises:
        UserError: there is no such device, or fewer devices than processes.
    """
    processes, number = _processes(), int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device={name} is no device; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and processes > 1 and device.index is None:
        device = torch.device("cuda", number)
    elif device.type == "cuda" and processes > 1:
        raise UserError(f"runtime.device={name} names one device for {processes} processes; give cuda, cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device={name}: this machine has {torch.cuda.device_count()} CUDA devices. Use cpu or auto, or start "
            "fewer processes."
        )
    return device


def solver_device(device: torch.device, warnings: list[str]) -> torch.device:
    """Device of the column solver: the GPU of the model if CuPy can compile kernels for it, else the CPU, with a warning."""
    if device.type == "cuda" and importlib.util.find_spec("cupy") is None:
        warnings.append(
            "CuPy is not installed, so layers were solved on the CPU, which takes far longer. Install the extra gpu13 "
            "(CUDA 13) or gpu (CUDA 12): pip install '.[gpu13]'."
        )
        return torch.device("cpu")
    return device


def host_free() -> int:
    """Memory in bytes that this process may still allocate.

    It is the smaller of the system's available memory and the container's limit, divided by the processes that torchrun
    started on this machine.
    """
    free = psutil.virtual_memory().available
    for limit, used in zip(_LIMITS, _USED, strict=True):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return int(max(free, 0) // _processes())


def device_free(device: torch.device) -> int:
    """Free memory of a CUDA device; of the host for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free()


def disk_free(folder: Path) -> int:
    """Free room on the disk of ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def host_peak() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak(device: torch.device) -> int:
    """Peak memory of torch on a CUDA device so far; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch and of the compiled solver; None keeps torch's default."""
    import numba  # slow to import, and not needed for serving

    threads = threads or torch.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    # Last: both share an OpenMP runtime, and numba sets its number of threads at its first use.
    torch.set_num_threads(threads)


def tune_malloc() -> None:
    """Make the C library return large freed blocks to the system at once.

    By default it keeps blocks of up to 32 MB once some were freed. Between the tensors of a calibration batch they fragment
    the heap, so that a process may hold 1.5 times the memory that it uses.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**23)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """Number of this job's processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
