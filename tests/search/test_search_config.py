"""Settings of the search: budgets, defaults, refusals and old names."""

import dataclasses

import pytest

from matquant.errors import UserError
from matquant.search.config import RENAMED, SearchConfig, check_search, with_default_method
from matquant.typed_config import build

FIELDS = {field.name for field in dataclasses.fields(SearchConfig)}


def test_budgets_are_exact_and_ascending():
    assert [str(b) for b in SearchConfig(budgets=(4, 2.5, 3)).ascending_budgets] == ["2.5 bits", "3 bits", "4 bits"]
    (budget,) = SearchConfig(budget_gb=2.9).ascending_budgets
    assert (budget.kind, budget.value) == ("bytes", 2_900_000_000)
    (budget,) = SearchConfig(average_bits=2.3).ascending_budgets
    assert (budget.kind, budget.value * 10) == ("average_bits", 23)


@pytest.mark.parametrize("budget", [{"average_bits": 3.0}, {"budget_gb": 1.0}, {"budgets": (3.0,)}])
def test_budget_without_a_method_runs_the_default_method(budget):
    search = with_default_method(SearchConfig(name="none", method="none", **budget))
    assert (search.name, search.method) == ("hybrid", "hybrid")
    assert search.wanted


def test_none_without_a_budget_is_no_search():
    search = with_default_method(SearchConfig(name="none", method="none"))
    assert not search.wanted
    check_search(search, 8, per_bit_models=True)


@pytest.mark.parametrize("old", RENAMED)
def test_old_name_is_refused_with_the_new_one(old):
    assert RENAMED[old].removeprefix("search.") in FIELDS
    with pytest.raises(UserError, match=f"{old} .*{RENAMED[old]}"):
        build(SearchConfig, {old.removeprefix("search."): 1}, "search", RENAMED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_bits": None}, "exactly one budget.*found 0"),
        ({"budget_gb": 1.0}, "exactly one budget.*found 2"),
        ({"average_bits": 1.5}, "budget of 1.5 bits is too small"),
        ({"bits": (2, 9)}, r"search.bits: .* 2\.\.8; found 9"),
        ({"bits": (2, 2)}, "search.bits .*only once"),
        ({"bits": ()}, "search.bits needs at least one"),
        ({"survivors": (4, 2)}, "last number of survivors must be 1"),
        ({"tokens": (64,)}, "one value per stage"),
        ({"survivors": (1, 2, 1), "tokens": (2, 2, 2)}, "must not increase"),
        ({"offspring": 0}, "search.offspring must be at least 1; found 0"),
        ({"method": "anneal"}, "search.method must be one of none, sensitivity, evolve, hybrid; found 'anneal'"),
        ({"fitness": "speed"}, "search.fitness must be one of kl, sparse_kl, perplexity; found 'speed'"),
        ({"sensitivity": "guess"}, "search.sensitivity must be one of shared, measured, error; found 'guess'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    search = SearchConfig(**({"average_bits": 3.0} | changes))
    with pytest.raises(UserError, match=message):
        check_search(search, 8, per_bit_models=False)


def test_search_needs_one_parent_and_its_bits():
    search = SearchConfig(average_bits=3.0)
    check_search(search, 8, per_bit_models=False)
    with pytest.raises(UserError, match="one model per bit-width.*method.per_bit_models=false"):
        check_search(search, 8, per_bit_models=True)
    with pytest.raises(UserError, match=r"2\.\.6; found 7"):
        check_search(search, 6, per_bit_models=False)
