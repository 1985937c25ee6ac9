"""Mutations keep the budget; start candidates meet it."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.search.allocation_problem import decimal_fraction
from matquant.search.mutation import make_offspring, random_candidate, switch_levels, trade_bits, uniform_candidate
from tests.search.evaluation import problem_of_sizes


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([4, 8, 32]), min_size=2, max_size=12),
    st.sampled_from([2.0, 2.25, 3.0, 4.7, 8.0]),
    st.integers(0, 1000),
)
def test_offspring_keep_the_budget_and_differ(sizes, average_bits, seed):
    problem, rng = problem_of_sizes(sizes, average_bits), random.Random(seed)
    parent = random_candidate(problem, rng)
    assert problem.fits(parent)
    for mutate in (switch_levels, trade_bits):
        children = make_offspring(problem, parent, 10, rng, mutate)
        assert all(problem.fits(child) for child in children)
        assert len(set(children)) == len(children)
        assert parent not in children


def test_level_switches_stay_within_units_of_equal_cost():
    problem = problem_of_sizes([4, 4, 4, 100, 100], 4)
    parent = (4, 4, 4, 4, 4)
    for child in make_offspring(problem, parent, 30, random.Random(0), switch_levels):
        assert sum(child[:3]) <= 12
        assert sum(child[3:]) <= 8
    traded = make_offspring(problem, parent, 30, random.Random(0), trade_bits)
    assert any(sum(child[:3]) > 12 for child in traded)


def test_uniform_candidate_exists_for_a_bit_width_of_the_problem_only():
    problem = problem_of_sizes([4, 4])
    assert uniform_candidate(problem, decimal_fraction(3.0)) == (3, 3)
    assert uniform_candidate(problem, decimal_fraction(2.5)) is None
    assert uniform_candidate(problem, decimal_fraction(5.0)) is None
