"""Script that compares searches: stopped searches resume, finished ones are not repeated."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import ROOT, load_script

FOLDER = ROOT / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Module of ``compare.py``."""
    monkeypatch.syspath_prepend(FOLDER)
    return load_script(FOLDER / "compare_searches.py")


def test_search_past_its_deadline_resumes_after_its_last_generation(script, tmp_path, capsys):
    import search_bench

    task = script.Task(0, 3.0, "evolve, published")
    written = []

    def build(draft):
        for number in range(1, 51):
            name = f"budget-00-generation-{number:04d}.json"
            if not draft.has(name):
                written.append(number)
                draft.write_json(name, number)
        return {}

    stopped = search_bench.WatchedStore(tmp_path, script.make_watcher(task, deadline=0))
    with pytest.raises(script.OutOfTime):
        stopped.open_or_build("search", {"seed": 0}, build)
    assert written == [1]
    resumed = search_bench.WatchedStore(tmp_path, script.make_watcher(task, deadline=math.inf))
    artifact = resumed.open_or_build("search", {"seed": 0}, build)
    assert written == list(range(1, 51))
    assert artifact.read_json("budget-00-generation-0050.json") == 50
    assert capsys.readouterr().out.count("evolve, published, seed 0, 3.0 bits: generation") == 2


def test_each_result_is_written_and_computed_once(script, tmp_path, monkeypatch, capsys):
    calls = []

    def run(task, max_tokens, deadline):
        calls.append((task, max_tokens))
        if task.budget == 3.5:
            raise OSError("the disk is full")
        if task.budget == 4.5:
            return None  # past the deadline
        return {
            "method": task.method,
            "budget": task.budget,
            "seed": task.seed,
            "kl": 0.1,
            "tokens": 7,
            "evaluations": 1,
        }

    monkeypatch.setattr(script, "run", run)
    path = tmp_path / "results.json"
    results = script.Results(path, "parent")
    first, second = script.plan_rounds(seeds=1, published=1, budgets=script.BUDGETS)
    assert [task.method for task in first[:8:4]] == ["evolve, published", "hybrid, a tenth"]
    with ThreadPoolExecutor(2) as pool:
        missing = [script.run_round(tasks, results, pool, time.time()) for tasks in (first, second)]
    assert missing == [6, 2]
    assert "hybrid, seed 0, 3.5 bits failed: OSError('the disk is full')" in capsys.readouterr().out
    # Evolution gets as many tokens as the hybrid search spent, and does not run without a hybrid result.
    equal_tokens = [(task.budget, tokens) for task, tokens in calls if task.method == script.EQUAL_TOKENS]
    assert equal_tokens == [(2.5, 7), (3.0, 7)]
    assert len(json.loads(path.read_text())["rows"]) == 8
    calls.clear()
    with ThreadPoolExecutor(2) as pool:
        script.run_round(first, script.Results(path, "parent"), pool, time.time())
    assert {task.budget for task, _ in calls} == {3.5, 4.5}


def test_results_of_another_parent_are_refused(script, tmp_path):
    path = tmp_path / "results.json"
    script.Results(path, "parent").write()
    with pytest.raises(SystemExit, match="another parent"):
        script.Results(path, "another")


@pytest.mark.slow
def test_overrides_of_all_methods_compose(script):
    from search_bench import compose_config

    for overrides in script.METHODS.values():
        assert compose_config(*overrides, "search.average_bits=3", "search.max_tokens=9").search.wanted
