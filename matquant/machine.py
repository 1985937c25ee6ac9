"""What this machine has: devices, their memory and that of the host, and room on a disk. All sizes in bytes."""

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

# M_MMAP_THRESHOLD of the GNU C library's <malloc.h>: from this size on a block is mapped by itself, and unmapped when freed.
_MMAP_THRESHOLD = -3

# Where Linux tells the memory limit of a container, new and old.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def device(name: str) -> torch.device:
    """The device that ``runtime.device`` names; under torchrun each process of a machine has a GPU of its own.

    Raises:
        UserError: there is no such device, or not one for each process.
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
    """Where layers are solved: on the GPU that runs the model, if CuPy can compile the solver's kernels for it."""
    if device.type == "cuda" and importlib.util.find_spec("cupy") is None:
        warnings.append(
            "Layers were solved on the CPU, which takes far longer, since CuPy is not installed. Install the extra gpu13 "
            "(CUDA 13) or gpu (CUDA 12): pip install '.[gpu13]'."
        )
        return torch.device("cpu")
    return device


def host_free() -> int:
    """Memory that this process may still take: what the system has available, or what its container is still allowed, or its
    part of that when torchrun started several."""
    free = psutil.virtual_memory().available
    for limit, used in zip(_LIMITS, _USED, strict=True):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return max(free, 0) // _processes()


def device_free(device: torch.device) -> int:
    """Free memory of a CUDA device; that of the host for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free()


def disk_free(folder: Path) -> int:
    """Room where ``folder`` is or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def host_peak() -> int:
    """The most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak(device: torch.device) -> int:
    """The most memory that torch has held on a CUDA device so far; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def use_threads(threads: int | None) -> None:
    """Let torch and the compiled solver use so many threads of the CPU; None: as many as torch uses by itself."""
    import numba  # slow to import, and of no use to a runtime that only serves

    threads = threads or torch.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    # Last, since the two share an OpenMP runtime, and numba sets its number of threads when it is first used.
    torch.set_num_threads(threads)


def tune_malloc() -> None:
    """Have large tensors that are freed go back to the system at once.

    The C library keeps blocks of up to 32 MB for itself once some were freed; between tensors of a calibration batch they
    leave holes, so that a process may hold half as much again as it uses.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**23)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """How many of this job's processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
