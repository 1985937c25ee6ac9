"""Where the seconds of a long job go."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import torch


class PhaseTimer:
    """Seconds by phase, of work on one device.

    A GPU works on while the host goes ahead. So a phase ends with waiting for it; what is measured within a phase does not, and
    takes the GPU's own time between two points of its stream.

    Attributes:
        seconds: of each phase so far; what was measured within another one counts there and not in the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._device = device
        self._parts: list[tuple[str, Callable[[], float]]] = []

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``phase``."""
        self._parts = []
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] += time.perf_counter() - start
        for part, measured in self._parts:
            seconds = measured()
            self.seconds[part] += seconds
            self.seconds[phase] -= seconds

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Inside ``timed``: adds the device's seconds to ``part`` instead of to the phase."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            spent = time.perf_counter() - start
            self._parts.append((part, lambda: spent))
            return
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        yield
        last.record(stream)
        self._parts.append((part, lambda: first.elapsed_time(last) / 1000))
