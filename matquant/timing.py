"""Timer for the phases of long work on one device."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import torch


class PhaseTimer:
    """Seconds by phase, of work on one device.

    GPU work is asynchronous. A phase therefore ends with a synchronization. A nested phase does not: it measures the GPU time
    between two events of the stream.

    Attributes:
        seconds: of each phase so far; a nested phase is not counted in the phase around it.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._device = device
        self._parts: list[tuple[str, Callable[[], float]]] = []

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside the context to ``phase``."""
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
    def nested(self, part: str) -> Iterator[None]:
        """Add the device's seconds to ``part`` instead of to the phase around it; for use inside ``timed``."""
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
