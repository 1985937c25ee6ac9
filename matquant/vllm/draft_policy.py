"""Decision whether a step drafts, by measured speed. Works without vLLM.

Each bit-width of the target and each range of batch sizes, (2^(k-1), 2^k] requests, has a decision of its own:

    tokens a second of plain decoding    requests a second
    tokens a second of drafting          requests a second x tokens that a request receives in a step

where "requests a second" is the number of requests of a step over its seconds, and the median of the last steps counts, so that
a single slow step does not matter. The second factor depends on the bit-width, but not on the batch size: all ranges share it.
"""

import collections
import dataclasses
import logging
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger("vllm.matquant")  # vLLM shows messages of its own logger and those below it

TRIAL_STEPS = 6  # steps of a trial of the kind that is not used
TRIAL_SHARE, FIRST_STEPS = 0.01, 24  # see DraftPolicy
MIN_STEPS = 3  # measured steps of each kind before a decision
MARGIN = 1.03  # the other kind must be faster by this factor
RECENT_STEPS = 3 * FIRST_STEPS  # age of the oldest measurement that a decision depends on

_KEPT_STEPS = 9  # a trial measures more than half of them
_KEPT_ACCEPTANCE = 64


@dataclasses.dataclass(slots=True)
class _Range:
    """Measurements at one bit-width and range of batch sizes, and the decision."""

    rates: dict[bool, collections.deque[tuple[int, float]]]  # of each kind: number of the step, requests a second
    rest: int = 0  # steps since the last trial
    trial: int = 0  # steps of the present trial that are left
    on: bool = True
    steps: int = 0
    seen: set[bool] = dataclasses.field(default_factory=set)


class DraftPolicy:
    """Decision for each step whether requests have drafts.

    Args:
        first_steps: number of steps before a trial while a kind is not measured.
        trial_share: largest share of trials in the steps, and in their time, after the first ones.

    Attributes:
        changes: number of decisions that changed.
    """

    def __init__(self, first_steps: int = FIRST_STEPS, trial_share: float = TRIAL_SHARE) -> None:
        self.changes = 0
        self._first, self._pause = first_steps, round(TRIAL_STEPS / trial_share)
        self._ranges: dict[tuple[str, int], _Range] = {}
        self._tokens: dict[str, collections.deque[tuple[int, int]]] = {}

    def use_drafts(self, width: str, batch: int, complete: int, decodes: bool = True) -> bool:
        """Decide for the next step. Each call with ``decodes`` counts as a step.

        Args:
            width: name of the target's bit-width.
            batch: number of requests in the step.
            complete: number of them whose tokens the draft model has read, all but a few.
            decodes: True if no request reads its prompt.
        """
        found = self._range(width, batch)
        if not decodes:
            return found.on and complete > 0
        found.steps += 1
        if found.trial == 0:
            found.rest += 1
            unknown = found.rest >= self._first and self._speed(width, found, not found.on) is None
            if unknown or (found.rest >= self._pause and found.rest >= self._pause * _cost_of_trial(found)):
                found.trial, found.rest = TRIAL_STEPS, 0
        if found.trial > 0:
            found.trial -= 1
            return not found.on
        return found.on and complete > 0

    def record(self, width: str, batch: int, drafts: bool, seconds: float, tokens: int | None = None) -> None:
        """Record a step in which all requests decoded, all with drafts or all without, and decide anew.

        Args:
            width, batch: see ``use_drafts``.
            drafts: True for a step with drafts that also made new ones.
            seconds: duration of the step.
            tokens: number of tokens that the requests received; None if some of them are not complete.
        """
        found = self._range(width, batch)
        if drafts and tokens is not None:
            self._acceptance(width).append((tokens, batch))
        if drafts in found.seen and seconds > 0:  # the first step of each kind also compiles or captures graphs
            found.rates[drafts].append((found.steps, batch / seconds))
        found.seen.add(drafts)
        self._decide(width, batch, found)

    def to_json(self) -> dict[str, Any]:
        """Decisions and measured tokens a second."""
        ranges = [
            {
                "bits": width,
                "requests": [_lowest(size), size],
                "drafts": found.on,
                "tokens_per_second": {
                    name: None if speed is None else round(speed, 2)
                    for name, speed in self._speeds(width, found).items()
                },
                "steps": found.steps,
            }
            for (width, size), found in sorted(self._ranges.items())
        ]
        tokens = {
            width: round(mean, 3) for width in self._tokens if (mean := self._tokens_per_request(width)) is not None
        }
        return {"changes": self.changes, "tokens_per_request_and_step": tokens, "ranges": ranges}

    def _range(self, width: str, batch: int) -> _Range:
        key = (width, _range_end(batch))
        if key not in self._ranges:
            rates = {kind: collections.deque[tuple[int, float]](maxlen=_KEPT_STEPS) for kind in (True, False)}
            self._ranges[key] = _Range(rates)
        return self._ranges[key]

    def _acceptance(self, width: str) -> collections.deque[tuple[int, int]]:
        return self._tokens.setdefault(width, collections.deque(maxlen=_KEPT_ACCEPTANCE))

    def _tokens_per_request(self, width: str) -> float | None:
        """Mean number of tokens that a request receives in a step with drafts; None if not measured."""
        counts = self._acceptance(width)
        return sum(tokens for tokens, _ in counts) / sum(batch for _, batch in counts) if counts else None

    def _speed(self, width: str, found: _Range, drafts: bool, since: int = 0) -> float | None:
        """Tokens a second with or without drafts, from steps since one on; None if not measured."""
        tokens = self._tokens_per_request(width) if drafts else 1.0
        rates = [rate for step, rate in found.rates[drafts] if step >= since]
        return None if tokens is None or len(rates) < MIN_STEPS else tokens * statistics.median(rates)

    def _speeds(self, width: str, found: _Range) -> Mapping[str, float | None]:
        return {"drafts": self._speed(width, found, True), "plain": self._speed(width, found, False)}

    def _decide(self, width: str, batch: int, found: _Range) -> None:
        used, other = (self._speed(width, found, kind, found.steps - RECENT_STEPS) for kind in (found.on, not found.on))
        if used is None or other is None or other <= MARGIN * used:
            return
        found.on, found.trial, found.rest = not found.on, 0, 0
        self.changes += 1
        speeds = self._speeds(width, found)
        logger.info(
            "Drafts %s for %s requests in a step (bits: %s): %.4g tokens a second with drafts, %.4g without.",
            "on" if found.on else "off",
            _range_name(_range_end(batch)),
            width,
            speeds["drafts"],
            speeds["plain"],
        )


def _cost_of_trial(found: _Range) -> float:
    """Duration of a step of the kind that is not used, over that of a step of the other; 1 if not measured."""
    used, other = found.rates[found.on], found.rates[not found.on]
    return _median_rate(used) / _median_rate(other) if used and other else 1.0


def _median_rate(steps: Iterable[tuple[int, float]]) -> float:
    return statistics.median(rate for _, rate in steps)


def _range_end(batch: int) -> int:
    """Largest batch size of the range that holds one: the next power of 2."""
    return 1 << (batch - 1).bit_length()


def _lowest(end: int) -> int:
    return end // 2 + 1


def _range_name(end: int) -> str:
    return str(end) if _lowest(end) == end else f"{_lowest(end)} to {end}"
