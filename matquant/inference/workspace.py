"""What blocks of a launch exchange sums through: a workspace, and counters that are 0 before and after each launch."""

import torch
from torch import Tensor

_SLAB = 2**20  # counters that are made at a time: 4 MiB


class Scratch:
    """The workspaces and counters of one device.

    Launches on one stream follow each other, so a stream has a workspace and counters of its own. A captured graph may run
    beside anything: each launch that is captured gets a workspace that belongs to the graph, and counters that nobody else
    ever gets.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index
        self._by_stream: dict[int, tuple[Tensor, Tensor]] = {}
        self._slab = self._new_slab(_SLAB)

    def now(self, counters: int, workspace: int) -> tuple[Tensor, Tensor]:
        """For a launch on the current stream.

        Returns:
            At least so many counters, int32 and all 0 when the launch begins; at least so many float32 numbers.
        """
        if torch.cuda.is_current_stream_capturing():
            return self._take(counters, capturing=True), self._room(workspace)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        held = self._by_stream.get(stream)
        if held is None or held[0].numel() < counters or held[1].numel() < workspace:
            kept = (
                held[0] if held is not None and held[0].numel() >= counters else self._take(counters, capturing=False)
            )
            held = self._by_stream[stream] = kept, self._room(workspace)
        return held

    def _room(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._device)

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
