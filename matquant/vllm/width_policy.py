"""Choice of the bit-width of a step: by load, and in turns among the requested bit-widths. Works without vLLM."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from matquant.vllm.width_settings import PolicySettings

logger = logging.getLogger("vllm.matquant")  # vLLM shows messages of its own logger and those below it

Width = int | None  # None: the bit-widths by layer that set_bits or the start chose


class LoadPolicy:
    """Bit-width by load.

    It falls by one of ``settings.bits`` when the waiting requests or the used share of the KV cache reach a limit, and rises
    by one when both have been low for ``hold_seconds``. Between the limits it stays. Times without any step count as low load.

    Args:
        clock: returns seconds.
    """

    def __init__(self, settings: PolicySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._clock = settings, clock
        self.switches = 0
        self._rung = 0
        self._changed = self._calm_since = clock()
        self._is_calm = True

    @property
    def bits(self) -> int:
        """Current bit-width."""
        return self.settings.bits[self._rung]

    def update(self, waiting: int, cache_usage: float) -> int:
        """Choose the bit-width of the next step.

        Args:
            waiting: number of requests that have not started.
            cache_usage: used share of the KV cache, 0 to 1.
        """
        now, limits = self._clock(), self.settings
        calm = waiting <= limits.raise_at_waiting and cache_usage <= limits.raise_at_cache
        rungs = 0
        if waiting >= limits.lower_at_waiting or cache_usage >= limits.lower_at_cache:
            if now - self._changed >= limits.hold_seconds:
                rungs = 1
        elif calm and self._is_calm:
            rungs = -self._calm_rungs(now)
        if not calm or not self._is_calm:
            self._calm_since = now
        self._is_calm = calm
        self._move(rungs, now, f"{waiting} requests wait, the KV cache is {cache_usage:.0%} full")
        return self.bits

    def _calm_rungs(self, now: float) -> int:
        """Number of bit-widths to rise by: more than one after a pause without steps."""
        since = max(self._calm_since, self._changed)
        if self.settings.hold_seconds == 0:
            return len(self.settings.bits)
        return int((now - since) / self.settings.hold_seconds)

    def _move(self, rungs: int, now: float, reason: str) -> None:
        before, last = self.bits, len(self.settings.bits) - 1
        self._rung = min(max(self._rung + rungs, 0), last)
        if self.bits != before:
            self._changed = now
            self.switches += 1
            logger.info("Bit-width %d -> %d: %s.", before, self.bits, reason)


class Turns:
    """Order of the steps of several bit-widths: each that has work gets one step in turn.

    Attributes:
        last: bit-width of the last step.
    """

    def __init__(self, first: Width = None) -> None:
        self.last = first

    def next(self, candidates: Collection[Width]) -> Width:
        """Bit-width of the next step: the next higher one than that of the last step, or else the lowest.

        It stays if no bit-width has work; such a step computes nothing.
        """
        ordered = sorted(candidates, key=_rank)
        higher = [width for width in ordered if _rank(width) > _rank(self.last)]
        self.last = (higher or ordered or [self.last])[0]
        return self.last


class StepCounts:
    """Numbers of steps and of computed tokens by bit-width, since the start."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    def add(self, width: Width, tokens: int) -> None:
        """Count a step, if it computes something."""
        if tokens == 0:
            return
        name = width_name(width)
        self.steps[name] = self.steps.get(name, 0) + 1
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def to_json(self) -> Mapping[str, Any]:
        """Numbers by the bit-width's name."""
        return {"steps": dict(self.steps), "tokens": dict(self.tokens)}


def width_name(width: Width) -> str:
    """Name of a bit-width in metrics and answers."""
    return "default" if width is None else str(width)


def _rank(width: Width) -> int:
    return 0 if width is None else width
