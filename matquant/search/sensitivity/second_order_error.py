"""Second-order error of each layer, recorded in the parent by the quantizer: no evaluation is needed."""

import math
from collections.abc import Mapping

from matquant.errors import UserError
from matquant.search.allocation_problem import AllocationProblem
from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun
from matquant.search.sensitivity.sensitivity_estimator import SensitivityEstimator


class SecondOrderSensitivity(SensitivityEstimator):
    """Relative second-order errors of the parent's layers."""

    def estimate(self, run: SearchRun) -> UnitLosses:
        """Read the errors from the parent.

        Raises:
            UserError: a layer has no recorded error.
        """
        errors = {row["name"]: row["error"] for row in run.context.parent.layer_errors()}
        return sum_layer_errors(run.problems[0], errors)


def sum_layer_errors(problem: AllocationProblem, errors: Mapping[str, Mapping[str, float]]) -> UnitLosses:
    """Sum of the relative output errors of the layers of each unit on the calibration text.

    Args:
        errors: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) by layer and bit-width. Missing bit-widths are interpolated or
            extrapolated on a log scale, because errors fall by about a constant factor per bit.

    Raises:
        UserError: a layer has no recorded error, for example after rounding to nearest.
    """
    return [
        {bits: sum(_error_at(bits, errors[name], name) for name in unit.layers) for bits in problem.bits}
        for unit in problem.units
    ]


def _error_at(bits: int, recorded: Mapping[str, float], name: str) -> float:
    known = {int(key): error for key, error in recorded.items() if error > 0}
    if not known:
        raise UserError(
            f"search.sensitivity=error: no second-order error is recorded for {name}. Use search.sensitivity=measured."
        )
    if bits in known or len(known) == 1:
        return known.get(bits) or next(iter(known.values()))
    below = max((b for b in known if b < bits), default=None)
    above = min((b for b in known if b > bits), default=None)
    if below is None or above is None:
        below, above = (sorted(known)[:2]) if below is None else (sorted(known)[-2:])
    weight = (bits - below) / (above - below)
    return math.exp((1 - weight) * math.log(known[below]) + weight * math.log(known[above]))
