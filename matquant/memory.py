"""Memory estimates of stages, compared with the free memory of this machine before a job starts. All sizes are in bytes."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from matquant import machine
from matquant.errors import UserError

FLOAT32_BYTES = 4
_GB = 1e9
_PROBE_SIZES = {"cpu": 1024, "cuda": 4096}  # rows and columns of the matrix product that measures the speed of a device
_ACHIEVED_SHARES = {"cpu": 1.0, "cuda": 0.4}  # of that speed in a whole job; 0.36 in refine=scales at 8B on an H200

Stage = Literal["quantize", "refine", "evaluate", "generate"]
Offload = torch.device | Path  # device that holds the hidden states between two blocks, or the folder of a file

# Advice for a stage that needs too much memory of the GPU, or of the host.
_ADVICE: dict[Stage, tuple[str, str]] = {
    "quantize": (
        "Propagate fewer method.calibration_bits, lower calibration.batch_size and the eval batch sizes, or use "
        "runtime.device=cpu.",
        "Propagate fewer method.calibration_bits, set method.asymmetric_calibration=false, lower the batch sizes or "
        "calibration.sequences, or skip the widest layers with method.skip.",
    ),
    "refine": (
        "A refinement holds the whole model. Lower refine.text.batch_size or refine.text.sequence_length, refine fewer "
        "refine.bits, or use a larger GPU.",
        "A refinement holds the whole model. Lower refine.text.batch_size, refine.text.sequences or "
        "refine.text.sequence_length, or refine fewer refine.bits.",
    ),
    "evaluate": (
        "Lower the batch_size of eval.datasets, or use runtime.device=cpu.",
        "Lower the batch_size or the sequences of eval.datasets, or evaluate fewer bits at once.",
    ),
    "generate": (
        "Text generation holds the whole model. Ask for lower bits, whose planes alone are kept, or use runtime.device=cpu.",
        "Text generation holds the whole model. Ask for lower bits, whose planes alone are kept, or use a larger GPU.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Peak memory of one stage: on the device (0 if that is the CPU), on the host, and on the disk."""

    stage: Stage
    device: int
    host: int
    disk: int


def estimate(
    stage: Stage, *, running: int, cached: int, on_host: int = 0, disk: int = 0, on_gpu: bool, offload: Offload
) -> MemoryEstimate:
    """Estimate of a stage whose hidden states are kept between two blocks.

    Args:
        running: peak beside the hidden states, on the device where blocks run.
        cached: hidden states of all sequences and models.
        on_host: peak on the host beside a GPU.
        disk: files beside the hidden states.
        offload: storage of the hidden states.
    """
    disk += cached if isinstance(offload, Path) else 0
    if not on_gpu:
        return MemoryEstimate(
            stage=stage, device=0, host=running + (0 if isinstance(offload, Path) else cached), disk=disk
        )
    on_device = isinstance(offload, torch.device) and offload.type == "cuda"
    in_ram = isinstance(offload, torch.device) and not on_device
    return MemoryEstimate(
        stage=stage, device=running + (cached if on_device else 0), host=on_host + (cached if in_ram else 0), disk=disk
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Peak memory of a job beside the free memory; peaks of the host include what the process has already allocated.

    Attributes:
        parameters, checkpoint, parent: size of the model in parameters, of its checkpoint and of its parent in bytes.
        worst_on_host, worst_on_device: stages of the peaks.
        place: storage of the hidden states between two blocks; None without any.
        seconds: rough run time from a quick probe of the device.
    """

    parameters: int
    checkpoint: int
    parent: int
    host_peak: int
    host_free: int
    worst_on_host: Stage
    device_peak: int
    device_free: int
    worst_on_device: Stage
    disk: int
    disk_free: int
    place: str | None
    seconds: float

    def sentence(self) -> str:
        """Plan as one line for the terminal."""
        gpu = f", {self.device_peak / _GB:.2f} GB of GPU memory" if self.device_peak else ""
        offload = f" hidden states in {self.place};" if self.place else ""
        return (
            f"plan: {self.parameters / 1e6:,.1f} M parameters ({self.checkpoint / _GB:.2f} GB); peak "
            f"{self.host_peak / _GB:.2f} GB of memory{gpu}; {self.disk / _GB:.2f} GB of disk;{offload} "
            f"about {_duration(self.seconds)}"
        )

    def refuse(self) -> None:
        """Raise UserError if the job cannot fit, with advice."""
        for what, needed, free, advice in (
            ("GPU memory", self.device_peak, self.device_free, _ADVICE[self.worst_on_device][0]),
            ("memory", self.host_peak, self.host_free, _ADVICE[self.worst_on_host][1]),
            (
                "room on the disk of store.path",
                self.disk,
                self.disk_free,
                "Free some room, or set store.path to another disk.",
            ),
        ):
            if needed > free:
                raise UserError(
                    f"This job needs about {needed / _GB:.2f} GB of {what}, but there are {free / _GB:.2f} GB. {advice} "
                    "runtime.check_memory=false starts it nevertheless."
                )


def make_plan(
    estimates: Sequence[MemoryEstimate],
    operations: Mapping[torch.dtype, float],
    *,
    parameters: int,
    checkpoint: int,
    parent: int,
    device: torch.device,
    offload: Offload | None,
    store: Path,
    launch_seconds: float = 0.0,
) -> MemoryPlan:
    """Worst of the stages' estimates beside the free memory of this machine.

    Args:
        estimates: of the job's stages, which run one after the other.
        operations: floating-point operations of all stages, by the dtype of their matrix products.
        parameters: of the model.
        checkpoint, parent: bytes of both.
        offload: storage of the hidden states; None without any.
        store: folder of the store.
        launch_seconds: run time that does not depend on the operations.
    """
    now = psutil.Process().memory_info().rss
    on_gpu = device.type == "cuda"
    on_host, on_device = (max(estimates, key=lambda one: getattr(one, where)) for where in ("host", "device"))
    return MemoryPlan(
        parameters=parameters,
        checkpoint=checkpoint,
        parent=parent,
        host_peak=max(machine.host_peak(), now + on_host.host),
        host_free=now + machine.host_free(),
        worst_on_host=on_host.stage,
        device_peak=on_device.device,
        device_free=machine.device_free(device) if on_gpu else 0,
        worst_on_device=on_device.stage,
        disk=max(one.disk for one in estimates),
        disk_free=machine.disk_free(store),
        place=_describe(offload),
        seconds=launch_seconds
        + sum(count / _operations_per_second(device, dtype) for dtype, count in operations.items()),
    )


def _describe(offload: Offload | None) -> str | None:
    if offload is None:
        return None
    return "a file" if isinstance(offload, Path) else "GPU memory" if offload.type == "cuda" else "memory"


def _operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a job whose matrix products have this dtype, from the time of one product."""
    size = _PROBE_SIZES[device.type]
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    start = time.perf_counter()
    (matrix @ matrix).sum().item()
    return _ACHIEVED_SHARES[device.type] * 2.0 * size**3 / max(time.perf_counter() - start, 1e-6)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
