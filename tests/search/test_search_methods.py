"""Search methods on a known loss: budgets, several budgets at once, resumption, and the registry."""

from types import SimpleNamespace

import pytest
from shared import ROOT

from matquant.search import knapsack
from matquant.search.budget_loop import search_budgets
from matquant.search.config import SearchConfig
from matquant.search.methods import SEARCH_METHODS, Finalists, SearchMethod
from matquant.search.search_run import SearchRun
from tests.search.evaluation import AdditiveEvaluator, MemoryJournal, problem_of_sizes

pytestmark = pytest.mark.slow

SIZES = [4] * 6 + [16] * 4
BUDGETS = (2.5, 3.0, 4.0)


def search(method, journal=None, evaluator=None, **changes):
    """Content of ``front.json`` of a search with three budgets."""
    problems = [problem_of_sizes(SIZES, budget) for budget in BUDGETS]
    settings = {"budgets": BUDGETS, "bits": problems[0].bits, "sensitivity": "measured", "generations": 4}
    config = SearchConfig(name=method, method=method, **(settings | changes))
    evaluator = evaluator or AdditiveEvaluator(problems[0])
    journal = MemoryJournal() if journal is None else journal
    run = SearchRun(config, SimpleNamespace(), problems, evaluator, journal)
    return search_budgets(run, progress=lambda steps: None)


@pytest.mark.parametrize("method", SEARCH_METHODS)
def test_each_budget_is_kept_and_the_loss_never_increases_with_it(method):
    front = search(method)["front"]
    assert len(front) == len(BUDGETS)
    for row, budget in zip(front, BUDGETS, strict=True):
        assert row["average_bits"] <= budget
    losses = [row["measured"] for row in front]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["sensitivity", "hybrid"])
def test_additive_losses_are_minimized_exactly_and_predicted(method):
    problems = [problem_of_sizes(SIZES, budget) for budget in BUDGETS]
    evaluator = AdditiveEvaluator(problems[0])
    found = search(method, evaluator=evaluator)
    for row, problem in zip(found["front"], problems, strict=True):
        optimum = evaluator.loss(knapsack.solve(problem, evaluator.terms))
        assert row["measured"] == pytest.approx(optimum)
        assert row["predicted"] == pytest.approx(optimum)
    assert len(found["units"]) == len(SIZES)


def test_evolution_estimates_no_unit_losses():
    found = search("evolve")
    assert found["units"] == []
    assert {row["predicted"] for row in found["front"]} == {None}


@pytest.mark.parametrize("method", SEARCH_METHODS)
def test_resumed_search_gives_the_same_result(method):
    whole = MemoryJournal()
    expected = search(method, whole)
    for steps in range(len(whole)):
        journal = MemoryJournal({name: whole[name] for name in list(whole)[:steps]})
        assert search(method, journal) == expected
        assert journal == whole


@pytest.mark.parametrize("method", SEARCH_METHODS)
def test_reported_cost_is_the_cost_of_the_evaluator(method):
    evaluator = AdditiveEvaluator(problem_of_sizes(SIZES))
    found = search(method, evaluator=evaluator)
    assert (found["evaluations"], found["tokens"]) == (evaluator.cost.evaluations, evaluator.cost.tokens)


@pytest.mark.parametrize("method", SEARCH_METHODS)
def test_each_method_has_a_preset_of_its_name(method):
    preset = ROOT / "conf" / "search" / f"{method}.yaml"
    first = preset.read_text().splitlines()[0]
    assert first.startswith(f"# python run.py search={method}")


def test_one_registry_line_adds_a_method(monkeypatch):
    class LowestBitsSearch(SearchMethod):
        needs_unit_losses = False

        def search(self, task):
            return Finalists(candidates=[task.problem.uniform(task.problem.bits[0])])

    monkeypatch.setitem(SEARCH_METHODS, "lowest_bits", LowestBitsSearch)
    assert [row["average_bits"] for row in search("lowest_bits")["front"]] == [2.0, 2.0, 2.0]
