"""Events of a training run with seconds and device memory, for scripts that measure."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from matquant.store import Draft


@dataclasses.dataclass(slots=True)
class Timeline:
    """Events of one refinement, with the seconds and the peaks of memory since the event before.

    Attributes:
        changed: called after each event.
        events: ``event``, ``seconds``, and on a GPU what ``device_memory`` finds.
        last: time of the last event.
    """

    device: torch.device
    changed: Callable[[], None]
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    last: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, event: str) -> None:
        """Record an event that ends now."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.last
        self.events.append(
            {"event": event, "seconds": round(seconds, 4)} | (device_memory(self.device) if on_gpu else {})
        )
        self.changed()
        self.last = time.perf_counter()

    def seconds(self, event: str) -> list[float]:
        """Seconds up to each event of this name."""
        return [row["seconds"] for row in self.events if row["event"] == event]

    def peaks(self) -> dict[str, int]:
        """Peaks of device memory in bytes; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        largest = {name: max(row[name] for row in self.events) for name in ("allocated", "reserved", "device_used")}
        # What graphs kept before an event: a peak during their capture has their tensors among the allocated ones.
        kept = [0, *(row["kept_by_graphs"] for row in self.events)]
        needed = (row["allocated"] + before for row, before in zip(self.events, kept, strict=False))
        return largest | {"needed": max(needed)}


class TimedDraft:
    """Draft whose written files are events.

    Args:
        blocks: names of the files of blocks; any other one is the state of the training.

    Attributes:
        saved_bytes: of the state.
    """

    def __init__(self, draft: Draft, timeline: Timeline, blocks: set[str]) -> None:
        self._draft, self._timeline, self._blocks = draft, timeline, blocks
        self.saved_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draft, name)

    def write_tensors(
        self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """``Draft.write_tensors``."""
        self._draft.write_tensors(name, tensors, metadata)
        if name in self._blocks:
            self._timeline.add("write a block")
        else:
            self.saved_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self._timeline.add("save")


def device_memory(device: torch.device) -> dict[str, int]:
    """Peaks since the last call, and present memory of CUDA graphs and of the device, in bytes."""
    free, total = torch.cuda.mem_get_info(device)
    segments = [one for one in torch.cuda.memory_snapshot() if one["device"] == device_index(device)]
    of_graphs = [one for one in segments if tuple(one["segment_pool_id"]) != (0, 0)]
    found = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "kept_by_graphs": sum(one["total_size"] - one["allocated_size"] for one in of_graphs),
        "device_used": total - free,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def device_index(device: torch.device) -> int:
    """Number of a CUDA device, of the current one by default."""
    return torch.cuda.current_device() if device.index is None else device.index
