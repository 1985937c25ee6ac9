"""Measured loss of each unit alone at every bit-width."""

from matquant.search.allocation_problem import FULL_PRECISION, AllocationProblem, Candidate
from matquant.search.evaluator import Evaluator
from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun
from matquant.search.sensitivity.sensitivity_estimator import SensitivityEstimator
from matquant.search.token_sample import TokenSample


class MeasuredSensitivity(SensitivityEstimator):
    """One evaluation per unit and bit-width."""

    def estimate(self, run: SearchRun) -> UnitLosses:
        """Measure on ``search.sensitivity_tokens`` tokens."""
        sample = run.draw("sensitivity", run.config.sensitivity_tokens)
        return measure_unit_losses(run.problems[0], run.evaluator, sample)


def measure_unit_losses(problem: AllocationProblem, evaluator: Evaluator, sample: TokenSample) -> UnitLosses:
    """Increase of the loss when one unit is quantized and all others stay in full precision."""
    alone = [quantize_one(problem, unit, bits) for unit in range(len(problem.units)) for bits in problem.bits]
    base, *losses = evaluator.losses([problem.uniform(FULL_PRECISION), *alone], sample)
    increases = iter(losses)
    return [{bits: max(next(increases) - base, 0.0) for bits in problem.bits} for _ in problem.units]


def quantize_one(problem: AllocationProblem, unit: int, bits: int) -> Candidate:
    """Candidate with one quantized unit."""
    return tuple(bits if u == unit else FULL_PRECISION for u in range(len(problem.units)))
