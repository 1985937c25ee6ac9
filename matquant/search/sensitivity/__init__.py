"""Sensitivity estimators by the value of ``search.sensitivity``."""

import dataclasses

from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun
from matquant.search.sensitivity.measured import MeasuredSensitivity
from matquant.search.sensitivity.second_order_error import SecondOrderSensitivity
from matquant.search.sensitivity.sensitivity_estimator import SensitivityEstimator
from matquant.search.sensitivity.uniform_shares import UniformShareSensitivity

SENSITIVITY_ESTIMATORS: dict[str, type[SensitivityEstimator]] = {
    "shared": UniformShareSensitivity,
    "measured": MeasuredSensitivity,
    "error": SecondOrderSensitivity,
}


def estimate_unit_losses(run: SearchRun) -> UnitLosses:
    """Estimate the loss of each unit with the configured estimator, or take it from the journal.

    Raises:
        UserError: the parent lacks data that the estimator needs.
    """
    bits = run.problems[0].bits
    saved = run.journal.load("sensitivity")
    if saved is None:
        before = dataclasses.replace(run.evaluator.cost)
        losses = SENSITIVITY_ESTIMATORS[run.config.sensitivity]().estimate(run)
        saved = {
            "losses": [[unit[b] for b in bits] for unit in losses],
            "evaluations": run.evaluator.cost.evaluations - before.evaluations,
            "tokens": run.evaluator.cost.tokens - before.tokens,
        }
        run.journal.save("sensitivity", saved)
    run.add_cost(saved)
    return [dict(zip(bits, unit, strict=True)) for unit in saved["losses"]]
