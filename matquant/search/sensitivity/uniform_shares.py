"""Share of each unit in the loss of the uniform slices: a fraction of the evaluations of ``measured``.

The loss of a unit alone falls with the bit-width by about the same factor in all units. So a unit's share in the sum
over the units hardly depends on the bit-width, and is measured at a few bit-widths only (the anchors).
"""

from collections.abc import Sequence

import numpy as np

from matquant.search.allocation_problem import FULL_PRECISION, AllocationProblem
from matquant.search.evaluator import Evaluator
from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun
from matquant.search.sensitivity.measured import quantize_one
from matquant.search.sensitivity.sensitivity_estimator import SensitivityEstimator
from matquant.search.token_sample import TokenSample

_MIN_SHARE = 1e-3  # of the mean share: on few tokens the measured loss of a unit can be zero


class UniformShareSensitivity(SensitivityEstimator):
    """Evaluations of the uniform slices, and of each unit at the bit-widths next to the budgets."""

    def estimate(self, run: SearchRun) -> UnitLosses:
        """Measure on ``search.sensitivity_tokens`` tokens."""
        sample = run.draw("sensitivity", run.config.sensitivity_tokens)
        anchors = sorted(set[int]().union(*(nearest_bits(problem) for problem in run.problems)))
        return measure_shares(run.problems[0], run.evaluator, sample, anchors)


def measure_shares(
    problem: AllocationProblem, evaluator: Evaluator, sample: TokenSample, anchors: Sequence[int]
) -> UnitLosses:
    """Split the loss of each uniform slice among the units.

    Shares are interpolated between the anchors on a log scale and constant beyond them. The losses of the units add up
    to the loss of the uniform slice. That is less than the sum of the losses alone, because the layers of the parent
    are calibrated on each other's errors.

    Args:
        anchors: bit-widths, ascending, at which each unit is measured alone.
    """
    count = len(problem.units)
    uniform = [problem.uniform(bits) for bits in problem.bits]
    alone = [quantize_one(problem, unit, bits) for bits in anchors for unit in range(count)]
    base, *losses = evaluator.losses([problem.uniform(FULL_PRECISION), *uniform, *alone], sample)
    increases = np.maximum(np.array(losses) - base, 0.0)
    total, parts = increases[: len(uniform)], increases[len(uniform) :].reshape(len(anchors), count)
    parts = np.maximum(parts, _MIN_SHARE * parts.mean(axis=1, keepdims=True))
    log_shares = np.log(parts / parts.sum(axis=1, keepdims=True))
    interpolated = np.array([[np.interp(bits, anchors, row) for bits in problem.bits] for row in log_shares.T])
    table = np.exp(interpolated) / np.exp(interpolated).sum(axis=0) * total
    return [dict(zip(problem.bits, row.tolist(), strict=True)) for row in table]


def nearest_bits(problem: AllocationProblem) -> set[int]:
    """Bit-widths whose uniform candidates are next to the budget: the highest that fits and the lowest that does not."""
    costs = {bits: problem.cost(problem.uniform(bits)) for bits in problem.bits}
    below = [bits for bits, cost in costs.items() if cost <= problem.limit][-1:]
    above = [bits for bits, cost in costs.items() if cost > problem.limit][:1]
    return {*below, *above}
