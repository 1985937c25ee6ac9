"""What each unit costs in quality alone at each width: measured, or from the layers' second-order errors."""

import math
from collections.abc import Mapping

from matquant.search.evaluator import FULL, Evaluator, Sample
from matquant.search.knapsack import Losses
from matquant.search.problem import Candidate, Problem


def measure(problem: Problem, evaluator: Evaluator, sample: Sample) -> Losses:
    """The rise of the loss when one unit alone is quantized and all others stay in full precision."""
    full: Candidate = (FULL,) * len(problem.units)
    alone = [(*full[:unit], bits, *full[unit + 1 :]) for unit in range(len(problem.units)) for bits in problem.widths]
    base, *found = evaluator.losses([full, *alone], sample)
    rises = iter(found)
    return [{bits: max(next(rises) - base, 0.0) for bits in problem.widths} for _ in problem.units]


def from_errors(problem: Problem, errors: Mapping[str, Mapping[str, float]]) -> Losses:
    """The relative errors of the layers' outputs on the calibration text, added up within a unit.

    Args:
        errors: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) by layer and width, as the parent records them. Between recorded
            widths it is interpolated, beyond them continued, on a log scale: errors fall by a factor for each bit.

    Raises:
        ValueError: a layer has no recorded error, as after rounding without calibration.
    """
    return [
        {bits: sum(_error_at(bits, errors[name], name) for name in unit.layers) for bits in problem.widths}
        for unit in problem.units
    ]


def _error_at(bits: int, recorded: Mapping[str, float], name: str) -> float:
    known = {int(width): error for width, error in recorded.items() if error > 0}
    if not known:
        raise ValueError(f"no second-order error is recorded for {name}")
    if bits in known or len(known) == 1:
        return known.get(bits) or next(iter(known.values()))
    below = max((w for w in known if w < bits), default=None)
    above = min((w for w in known if w > bits), default=None)
    if below is None or above is None:
        below, above = (sorted(known)[:2]) if below is None else (sorted(known)[-2:])
    share = (bits - below) / (above - below)
    return math.exp((1 - share) * math.log(known[below]) + share * math.log(known[above]))
