"""Allocation problems: exact budgets, costs and units."""

from fractions import Fraction

import pytest

from matquant.errors import UserError
from matquant.search.allocation_problem import Budget, LayerCost, make_problem
from tests.search.evaluation import average_bits_budget

BITS = (2, 3, 4, 6, 8)


def layer_costs(sizes, scale_bytes=16):
    return [
        LayerCost(
            name=f"l{i}",
            block=i // 2,
            parameters=size,
            bytes_read={b: size * b // 8 + scale_bytes for b in range(2, 9)},
        )
        for i, size in enumerate(sizes)
    ]


def test_average_bits_budget_is_exact_in_decimal():
    # Ten times 2.3 is 23. The binary fraction nearest to 2.3 is a little less.
    problem = make_problem(layer_costs([10] * 10), BITS, average_bits_budget(2.3))
    assert problem.limit == 230
    assert problem.fits((3, 3, 3, 2, 2, 2, 2, 2, 2, 2))
    assert not problem.fits((3, 3, 3, 3, 2, 2, 2, 2, 2, 2))


def test_byte_budget_includes_scales():
    problem = make_problem(layer_costs([80, 160], scale_bytes=5), (2, 4), Budget(kind="bytes", value=Fraction(90)))
    assert problem.cost((4, 2)) == 40 + 40 + 2 * 5  # codes of both layers, and their scales
    assert problem.fits((4, 2))
    assert not problem.fits((2, 4))


def test_infeasible_budget_is_refused():
    with pytest.raises(UserError, match=r"1\.9 bits is too small.*2 bits in every layer, needs 2 bits"):
        make_problem(layer_costs([10, 20]), BITS, average_bits_budget(1.9))
    with pytest.raises(UserError, match="needs 3.9e-08 GB"):
        make_problem(layer_costs([10, 20], scale_bytes=16), BITS, Budget(kind="bytes", value=Fraction(1)))


def test_fused_layers_are_one_unit():
    problem = make_problem(layer_costs([8] * 4), BITS, average_bits_budget(3), fused_groups=[("l0", "l1"), ("l2",)])
    assert [unit.layers for unit in problem.units] == [("l0", "l1"), ("l2",), ("l3",)]
    assert problem.layer_bits((2, 3, 4)) == {"l0": 2, "l1": 2, "l2": 3, "l3": 4}
    assert problem.average_bits((2, 3, 4)) == 11 / 4


def test_units_are_grouped_by_equal_costs():
    problem = make_problem(layer_costs([8, 16, 8]), BITS, average_bits_budget(3))
    assert problem.equal_cost_units == [[0, 2], [1]]
