"""Counters of finished blocks, 0 before and after each launch, that no two launches under way may share."""

import torch
from torch import Tensor

_SLAB = 2**20  # counters that are made at a time: 4 MiB


class Tickets:
    """The counters of one device.

    Launches on one stream follow each other, so a stream has counters of its own. A captured graph may run beside anything,
    so each launch that is captured gets counters that nobody else ever gets.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index
        self._by_stream: dict[int, Tensor] = {}
        self._slab = self._new_slab(_SLAB)

    def now(self, count: int) -> Tensor:
        """At least ``count`` counters for a launch on the current stream: int32, all 0 when it begins."""
        if torch.cuda.is_current_stream_capturing():
            return self._take(count, capturing=True)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        held = self._by_stream.get(stream)
        if held is None or held.numel() < count:
            held = self._by_stream[stream] = self._take(count, capturing=False)
        return held

    def _take(self, count: int, *, capturing: bool) -> Tensor:
        if count > self._slab.numel():
            if capturing:  # nothing outside the graph can be made now; the graph sets these to 0 each time
                return torch.zeros(count, dtype=torch.int32, device=self._device)
            self._slab = self._new_slab(max(count, _SLAB))
        taken, self._slab = self._slab[:count], self._slab[count:]
        return taken

    def _new_slab(self, count: int) -> Tensor:
        """Made on a stream of its own: torch may be filling the memory pool of a graph on the current one."""
        side = torch.cuda.Stream(self._device)
        with torch.cuda.stream(side):
            slab = torch.zeros(count, dtype=torch.int32, device=self._device)
        side.synchronize()
        return slab
