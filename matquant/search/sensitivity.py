"""What each unit costs in quality alone at each width: measured, or from the layers' second-order errors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from matquant.search.allocation_problem import Candidate, Problem
from matquant.search.evaluator import FULL, Evaluator, Sample
from matquant.search.knapsack import Losses

_LEAST_SHARE = 1e-3  # of the mean: no unit is without loss, whatever a few tokens say


def measure(problem: Problem, evaluator: Evaluator, sample: Sample) -> Losses:
    """The rise of the loss when one unit alone is quantized and all others stay in full precision."""
    full: Candidate = (FULL,) * len(problem.units)
    alone = [(*full[:unit], bits, *full[unit + 1 :]) for unit in range(len(problem.units)) for bits in problem.widths]
    base, *found = evaluator.losses([full, *alone], sample)
    rises = iter(found)
    return [{bits: max(next(rises) - base, 0.0) for bits in problem.widths} for _ in problem.units]


def measure_shares(problem: Problem, evaluator: Evaluator, sample: Sample, anchors: Sequence[int]) -> Losses:
    """Each unit's share of what the uniform slices lose: a fraction of the measurements that ``measure`` takes.

    A unit's loss alone falls with the width by much the same factor in all units, so that its share of the sum over the
    units hardly depends on the width. It is measured at the anchors alone, held beyond them, and between two of them their
    geometric mean, each weighted by how near it is. Losses add up to those of the uniform slices, whose layers were
    calibrated on each other's errors and lose less together than one by one.

    Args:
        anchors: widths at which each unit is measured alone, such as those next to the budget.
    """
    count = len(problem.units)
    full: Candidate = (FULL,) * count
    uniform = [(bits,) * count for bits in problem.widths]
    alone = [(*full[:u], bits, *full[u + 1 :]) for bits in anchors for u in range(count)]
    base, *found = evaluator.losses([full, *uniform, *alone], sample)
    rises = np.maximum(np.array(found) - base, 0.0)
    total, parts = rises[: len(uniform)], rises[len(uniform) :].reshape(len(anchors), count)
    parts = np.maximum(parts, _LEAST_SHARE * parts.mean(axis=1, keepdims=True))
    shares = np.log(parts / parts.sum(axis=1, keepdims=True))
    between = np.array([[np.interp(bits, anchors, row) for bits in problem.widths] for row in shares.T])
    table = np.exp(between) / np.exp(between).sum(axis=0) * total
    return [dict(zip(problem.widths, row.tolist(), strict=True)) for row in table]


def anchors_of(problem: Problem) -> set[int]:
    """The widths whose uniform slices cost just no more than the budget, and just more."""
    costs = {bits: problem.cost((bits,) * len(problem.units)) for bits in problem.widths}
    below = [bits for bits, cost in costs.items() if cost <= problem.limit][-1:]
    above = [bits for bits, cost in costs.items() if cost > problem.limit][:1]
    return {*below, *above}


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
