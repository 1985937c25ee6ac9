"""Stream-K workspace and tile semaphores, per stream and per captured graph."""

import concurrent.futures
from collections.abc import Callable

import torch
from torch import Tensor

_SLAB = 2**20  # semaphores that are allocated at a time: 4 MiB


class Workspace:
    """Workspaces and tile semaphores of one device. Semaphores are 0 before and after each launch.

    Launches on one stream are serialized, so each stream has one workspace and one set of semaphores. A captured graph may run
    beside any other work: each captured launch gets a workspace that belongs to the graph, and semaphores of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index
        self._by_stream: dict[int, tuple[Tensor, Tensor]] = {}
        self._slab = self._new_slab(_SLAB)

    def acquire(self, semaphores: int, workspace: int) -> tuple[Tensor, Tensor]:
        """Buffers for a launch on the current stream.

        Returns:
            At least ``semaphores`` int32 numbers, all 0 when the launch begins; at least ``workspace`` float32 numbers.
        """
        if torch.cuda.is_current_stream_capturing():
            return self._take_semaphores(semaphores, capturing=True), self._new_workspace(workspace)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        held = self._by_stream.get(stream)
        if held is None or held[0].numel() < semaphores or held[1].numel() < workspace:
            enough = held is not None and held[0].numel() >= semaphores
            kept = held[0] if held is not None and enough else self._take_semaphores(semaphores, capturing=False)
            held = self._by_stream[stream] = kept, self._outside_graph_pools(lambda: self._new_workspace(workspace))
        return held

    def _new_workspace(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self._device)

    def _take_semaphores(self, count: int, *, capturing: bool) -> Tensor:
        if count > self._slab.numel():
            if capturing:  # no allocation outside the graph is possible now; the graph sets these to 0 at each replay
                return torch.zeros(count, dtype=torch.int32, device=self._device)
            self._slab = self._new_slab(max(count, _SLAB))
        taken, self._slab = self._slab[:count], self._slab[count:]
        return taken

    def _new_slab(self, count: int) -> Tensor:
        return self._outside_graph_pools(lambda: torch.zeros(count, dtype=torch.int32, device=self._device))

    def _outside_graph_pools(self, allocate: Callable[[], Tensor]) -> Tensor:
        """Allocate a buffer that is kept, in a thread and on a stream of its own.

        The warm-up of a CUDA graph runs without capture, but what this thread or its stream allocates then comes from the
        memory pool of the graph, which must not hold anything else.
        """
        used_by = torch.cuda.current_stream(self._device)

        def allocate_apart() -> Tensor:
            side = torch.cuda.Stream(self._device)
            with torch.cuda.stream(side):
                made = allocate()
            side.synchronize()
            made.record_stream(used_by)
            return made

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(allocate_apart).result()
