"""Sensitivity estimators on known losses."""

import pytest

from matquant.errors import UserError
from matquant.search.allocation_problem import FULL_PRECISION
from matquant.search.sensitivity.measured import measure_unit_losses
from matquant.search.sensitivity.second_order_error import sum_layer_errors
from matquant.search.sensitivity.uniform_shares import measure_shares, nearest_bits
from tests.search.evaluation import AdditiveEvaluator, problem_of_sizes


class ProportionalEvaluator(AdditiveEvaluator):
    """Loss that falls with the bit-width by the same factor in all units.

    The loss of the full-precision model is 0.5. A fully quantized model loses 3/4 of the sum of the units' losses alone.
    """

    def __init__(self, problem):
        super().__init__(problem)
        factors = {2: 1.0, 3: 0.2, 4: 0.06, 6: 0.005, 8: 0.002}
        self.terms = [{bits: unit[4] * factor for bits, factor in factors.items()} for unit in self.terms]

    def loss(self, candidate):
        together = 1.0 if FULL_PRECISION in candidate else 0.75
        return 0.5 + together * super().loss(candidate)


def test_measured_losses_are_those_of_the_units_alone():
    problem = problem_of_sizes([4] * 6, 3.5)
    evaluator = ProportionalEvaluator(problem)
    found = measure_unit_losses(problem, evaluator, evaluator.all_tokens())
    assert found == [pytest.approx(term) for term in evaluator.terms]
    assert evaluator.cost.evaluations == 1 + 6 * 5


def test_shares_add_up_to_the_loss_of_the_uniform_slices():
    problem = problem_of_sizes([4] * 6, 3.5)
    evaluator = ProportionalEvaluator(problem)
    found = measure_shares(problem, evaluator, evaluator.all_tokens(), [3, 4])
    assert evaluator.cost.evaluations == 1 + 5 + 2 * 6
    assert found == [pytest.approx({b: 0.75 * term[b] for b in problem.bits}) for term in evaluator.terms]


@pytest.mark.parametrize(
    ("average_bits", "bits", "nearest"),
    [(3.5, (2, 3, 4, 6, 8), {3, 4}), (2, (2, 4), {2, 4}), (8, (2, 8), {8}), (5, (2, 4, 6, 8), {4, 6})],
)
def test_nearest_bits_are_next_to_the_budget(average_bits, bits, nearest):
    assert nearest_bits(problem_of_sizes([4, 8], average_bits, bits)) == nearest


def test_missing_second_order_errors_are_interpolated_on_a_log_scale():
    problem = problem_of_sizes([4, 4], bits=(2, 3, 4, 8))
    recorded = {"l0": {"2": 0.16, "4": 0.01}, "l1": {"2": 0.4, "3": 0.1, "4": 0.02, "8": 0.001}}
    found = sum_layer_errors(problem, recorded)
    assert found[0] == pytest.approx({2: 0.16, 3: 0.04, 4: 0.01, 8: 0.01 / 256})
    assert found[1] == pytest.approx({2: 0.4, 3: 0.1, 4: 0.02, 8: 0.001})


def test_layer_without_a_second_order_error_is_refused():
    problem = problem_of_sizes([4, 4])
    with pytest.raises(UserError, match="search.sensitivity=error.*l1.*search.sensitivity=measured"):
        sum_layer_errors(problem, {"l0": {"2": 1.0}, "l1": {}})
