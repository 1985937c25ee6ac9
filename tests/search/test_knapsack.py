"""Knapsack: the optimum of both solvers equals the optimum of an enumeration."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.search import knapsack
from matquant.search.allocation_problem import AllocationProblem, Budget, LayerCost, make_problem
from tests.search.evaluation import average_bits_budget
from tests.search.test_allocation_problem import BITS, layer_costs

BRANCH_AND_BOUND = 0  # table cells: no dynamic program is small enough


def total_loss(losses, candidate):
    return sum(unit[bits] for unit, bits in zip(losses, candidate, strict=True))


@st.composite
def problems_with_losses(draw):
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    bits = draw(st.lists(st.sampled_from(range(2, 9)), min_size=1, max_size=4, unique=True))
    if draw(st.booleans()):
        budget = Budget(kind="average_bits", value=Fraction(draw(st.integers(min(bits) * 100, 800)), 100))
    else:
        smallest = sum(layer.bytes_read[min(bits)] for layer in layer_costs(sizes))
        budget = Budget(kind="bytes", value=Fraction(smallest + draw(st.integers(0, 150))))
    problem = make_problem(layer_costs(sizes), bits, budget)
    loss = st.floats(0, 10, allow_subnormal=False)
    return problem, [{b: draw(loss) for b in problem.bits} for _ in problem.units]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(problems_with_losses(), st.sampled_from([knapsack.MAX_TABLE_CELLS, BRANCH_AND_BOUND]))
def test_optimum_equals_enumeration(case, max_table_cells):
    problem, losses = case
    candidates = itertools.product(problem.bits, repeat=len(problem.units))
    least = min(total_loss(losses, candidate) for candidate in candidates if problem.fits(candidate))
    found = knapsack.solve(problem, losses, max_table_cells)
    assert problem.fits(found)
    assert total_loss(losses, found) == pytest.approx(least, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_both_solvers_agree_on_the_layers_of_llama_8b():
    sizes = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096] + [14336 * 4096] * 3
    layers = [
        LayerCost(name=f"{block}.{i}", block=block, parameters=size, bytes_read={b: size * b // 8 for b in range(2, 9)})
        for block in range(32)
        for i, size in enumerate(sizes)
    ]
    problem = make_problem(layers, BITS, average_bits_budget(3.1))
    rng = np.random.default_rng(0)
    losses = [{b: float(a * 4.0**-b) for b in problem.bits} for a in rng.lognormal(0, 1, len(problem.units))]
    one = knapsack.solve(problem, losses)
    other = knapsack.solve(problem, losses, BRANCH_AND_BOUND)
    assert problem.fits(one)
    assert problem.fits(other)
    assert total_loss(losses, one) == pytest.approx(total_loss(losses, other), rel=1e-6)


def test_problem_without_a_candidate_is_an_error():
    units = make_problem(layer_costs([10]), (2,), average_bits_budget(2)).units
    with pytest.raises(ValueError, match="no candidate fits"):
        knapsack.solve(AllocationProblem(units=units, bits=(2,), limit=0), [{2: 1.0}])
