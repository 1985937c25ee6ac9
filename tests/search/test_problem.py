"""Budgets are kept exactly, and the knapsack's optimum is the one that enumeration finds."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.errors import UserError
from matquant.search import knapsack
from matquant.search.allocation_problem import Budget, Layer, Problem, exact, make_problem

WIDTHS = (2, 3, 4, 6, 8)


def layers(sizes, scales=16):
    return [
        Layer(name=f"l{i}", block=i // 2, parameters=n, bytes={b: n * b // 8 + scales for b in range(2, 9)})
        for i, n in enumerate(sizes)
    ]


def every(problem: Problem):
    return (c for c in itertools.product(problem.widths, repeat=len(problem.units)) if problem.fits(c))


def total(losses, candidate):
    return sum(unit[bits] for unit, bits in zip(losses, candidate, strict=True))


def test_average_bits_are_exact_where_binary_fractions_are_not():
    # Ten times 2.3 is 23 exactly, but 2.3 as a binary fraction is a little less.
    problem = make_problem(layers([10] * 10), WIDTHS, Budget(kind="average_bits", value=exact(2.3)))
    assert problem.limit == 230
    assert problem.fits((3, 3, 3, 2, 2, 2, 2, 2, 2, 2))
    assert not problem.fits((3, 3, 3, 3, 2, 2, 2, 2, 2, 2))


def test_bytes_count_scales():
    sizes = [80, 160]
    problem = make_problem(layers(sizes, scales=5), (2, 4), Budget(kind="bytes", value=Fraction(90)))
    assert problem.cost((4, 2)) == 40 + 40 + 10  # codes of both layers, scales
    assert problem.fits((4, 2))
    assert not problem.fits((2, 4))


def test_an_infeasible_budget_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="1.9 bits cannot be kept: the narrowest width, 2 bits in every layer, needs 2"):
        make_problem(layers([10, 20]), WIDTHS, Budget(kind="average_bits", value=exact(1.9)))
    with pytest.raises(UserError, match="needs 3.9e-08 GB"):
        make_problem(layers([10, 20], scales=16), WIDTHS, Budget(kind="bytes", value=Fraction(1)))


def test_fused_layers_share_one_width():
    problem = make_problem(
        layers([8] * 4), WIDTHS, Budget(kind="average_bits", value=exact(3)), fused=[("l0", "l1"), ("l2",)]
    )
    assert [unit.layers for unit in problem.units] == [("l0", "l1"), ("l2",), ("l3",)]
    assert problem.layer_widths((2, 3, 4)) == {"l0": 2, "l1": 2, "l2": 3, "l3": 4}
    assert problem.average_bits((2, 3, 4)) == 11 / 4


@st.composite
def problems(draw):
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    widths = draw(st.lists(st.sampled_from(range(2, 9)), min_size=1, max_size=4, unique=True))
    kind = draw(st.sampled_from(["average_bits", "bytes"]))
    low = min(widths)
    if kind == "average_bits":
        value = Fraction(draw(st.integers(low * 100, 800)), 100)
    else:
        smallest = sum(layer.bytes[low] for layer in layers(sizes))
        value = Fraction(smallest + draw(st.integers(0, 150)))
    problem = make_problem(layers(sizes), widths, Budget(kind=kind, value=value))
    value = st.floats(0, 10, allow_subnormal=False)
    losses = [{bits: draw(value) for bits in problem.widths} for _ in problem.units]
    return problem, losses


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_the_knapsack_finds_what_enumeration_finds(case, small_tables):
    problem, losses = case
    least = min(total(losses, c) for c in every(problem))
    table = knapsack._LARGEST_TABLE
    try:
        knapsack._LARGEST_TABLE = 0 if small_tables else table
        found = knapsack.solve(problem, losses)
    finally:
        knapsack._LARGEST_TABLE = table
    assert problem.fits(found)
    assert total(losses, found) == pytest.approx(least, rel=1e-6, abs=1e-6)


def test_a_model_of_32_blocks_is_solved_exactly_by_both_ways(monkeypatch):
    """Llama-3.1-8B's layers: dynamic programming and branch and bound agree."""
    sizes = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096] + [14336 * 4096] * 3
    many = [
        Layer(name=f"{b}.{i}", block=b, parameters=n, bytes={w: n * w // 8 for w in range(2, 9)})
        for b in range(32)
        for i, n in enumerate(sizes)
    ]
    problem = make_problem(many, WIDTHS, Budget(kind="average_bits", value=exact(3.1)))
    rng = np.random.default_rng(0)
    losses = [{bits: float(a * 4.0**-bits) for bits in problem.widths} for a in rng.lognormal(0, 1, len(problem.units))]
    one = knapsack.solve(problem, losses)
    monkeypatch.setattr(knapsack, "_LARGEST_TABLE", 0)
    other = knapsack.solve(problem, losses)
    assert problem.fits(one)
    assert problem.fits(other)
    assert total(losses, one) == pytest.approx(total(losses, other), rel=1e-6)


def test_nothing_fits():
    problem = make_problem(layers([10]), (2,), Budget(kind="average_bits", value=exact(2)))
    with pytest.raises(ValueError, match="no candidate fits"):
        knapsack.solve(Problem(units=problem.units, widths=(2,), limit=0), [{2: 1.0}])
