"""The recipe that compares searches: cut off it keeps what it measured, and goes on from there."""

import importlib.util
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import ROOT


@pytest.fixture
def recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "compare_searches", ROOT / "experiments" / "benchmarks" / "compare_searches.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_searches", module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_a_search_out_of_time_goes_on_after_the_generation_that_it_stopped_at(recipe, tmp_path, capsys):
    task = recipe.Task(0, 3.0, "evolve, published")
    made = []

    def build(draft):
        for number in range(1, 51):
            name = f"budget-00-generation-{number:04d}.json"
            if not draft.has(name):
                made.append(number)
                draft.write_json(name, number)
        return {}

    stopping = recipe.WatchedStore(tmp_path, recipe.watcher(task, deadline=0))
    with pytest.raises(recipe.OutOfTime):
        stopping.open_or_build("search", {"seed": 0}, build)
    assert made == [1]
    lasting = recipe.WatchedStore(tmp_path, recipe.watcher(task, deadline=math.inf))
    artifact = lasting.open_or_build("search", {"seed": 0}, build)
    assert made == list(range(1, 51))
    assert artifact.read_json("budget-00-generation-0050.json") == 50
    out = capsys.readouterr().out
    assert out.count("evolve, published, seed 0, 3.0 bits: generation") == 2


def test_searches_are_written_one_by_one_and_done_once(recipe, tmp_path, monkeypatch, capsys):
    ran = []

    def run(task, tokens, deadline):
        ran.append((task, tokens))
        if task.budget == 3.5:
            raise OSError("the disk is full")
        if task.budget == 4.5:
            return None  # out of time
        return {
            "method": task.method,
            "budget": task.budget,
            "seed": task.seed,
            "kl": 0.1,
            "tokens": 7,
            "evaluations": 1,
        }

    monkeypatch.setattr(recipe, "run", run)
    path = tmp_path / "results.json"
    results = recipe.Results(path, "parent")
    first, second = recipe.wanted(seeds=1, published=1, budgets=list(recipe.BUDGETS))
    assert [task.method for task in first[:8:4]] == ["evolve, published", "hybrid, a tenth"]
    with ThreadPoolExecutor(2) as pool:
        missing = [recipe.measure(tasks, results, pool, time.time()) for tasks in (first, second)]
    assert missing == [6, 2]
    assert "hybrid, seed 0, 3.5 bits failed: OSError('the disk is full')" in capsys.readouterr().out
    # Evolution got as many tokens as the hybrid search before it spent, and did not begin without one.
    assert [(task.budget, tokens) for task, tokens in ran if task.method == recipe.EQUAL_TOKENS] == [(2.5, 7), (3.0, 7)]
    assert len(json.loads(path.read_text())["rows"]) == 8
    ran.clear()
    with ThreadPoolExecutor(2) as pool:
        recipe.measure(first, recipe.Results(path, "parent"), pool, time.time())
    assert {task.budget for task, _ in ran} == {3.5, 4.5}
    with pytest.raises(SystemExit, match="another parent"):
        recipe.Results(path, "another")


def test_every_search_is_one_that_the_configuration_knows(recipe):
    for overrides in recipe.METHODS.values():
        assert recipe.config_of(*overrides, "search.average_bits=3", "search.max_tokens=9").search.wanted
