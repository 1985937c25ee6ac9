"""The Optuna recipe: a failed job is reported and the others stand, and a second call does only what is missing."""

import importlib.util
import json
import subprocess
import sys

import pytest
from shared import ROOT

pytest.importorskip("optuna")


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("lambda_search", ROOT / "experiments" / "lambda" / "search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs = []

    def run(command, **_):
        folder = next(tmp_path / "study" / "jobs" / str(len(jobs)) for o in command if o.startswith("hydra.run.dir="))
        jobs.append(next(o for o in command if "objective.weights" in o))
        if len(jobs) == 2:
            return subprocess.CompletedProcess(command, 2, "", "error: the disk is full")
        folder.mkdir(parents=True)
        entry = {"bits": 2, "average_bits": 2.0, "bytes": 1, "kl": {"stdlib": 0.1 / len(jobs)}, "perplexity": {}}
        results = {"schema": 1, "model": "tiny", "method": "matgptq", "slices": [entry]}
        (folder / "results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)

    def call(trials):
        monkeypatch.setattr(sys, "argv", ["search.py", "--trials", str(trials), "--folder", str(tmp_path / "study")])
        return module.main()

    return call, jobs


def test_failed_and_missing_trials(recipe, tmp_path, capsys):
    call, jobs = recipe
    assert call(3) == 1
    out, err = capsys.readouterr()
    assert "failed: [1]" in err
    assert "best: 0.0333" in out
    assert jobs[0] == "++objective.weights={2:1,3:1.5,4:3,6:12,8:48}"
    assert "the disk is full" in (tmp_path / "study" / "jobs" / "1" / "error.txt").read_text()
    assert (tmp_path / "study" / "summary.html").is_file()
    assert len(jobs) == 3
    call(3)  # two are done, so one is missing
    assert len(jobs) == 4
    call(3)
    assert len(jobs) == 4
