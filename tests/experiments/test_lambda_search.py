"""Optuna script: failed trials are reported, and a second call runs only the missing ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shared import ROOT, load_script

pytest.importorskip("optuna")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Function that calls the script with stubbed jobs, and the weights of the jobs; the second job fails."""
    module = load_script(ROOT / "experiments" / "benchmarks" / "lambda_search.py")
    weights = []

    def run(command, **_):
        folder = next(Path(o.partition("=")[2]) for o in command if o.startswith("hydra.run.dir="))
        weights.append(next(o for o in command if "objective.weights" in o))
        if len(weights) == 2:
            return subprocess.CompletedProcess(command, 2, "", "error: the disk is full")
        folder.mkdir(parents=True)
        entry = {"bits": 2, "average_bits": 2.0, "bytes": 1, "kl": {"stdlib": 0.1 / len(weights)}, "perplexity": {}}
        results = {"schema": 1, "model": "tiny", "method": "matgptq", "slices": [entry]}
        (folder / "results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "provenance", lambda: {"commit": "0123abc"})  # runs git, by subprocess.run

    def call(trials, *arguments):
        folder = str(tmp_path / "study")
        monkeypatch.setattr(sys, "argv", ["search.py", "--trials", str(trials), "--folder", folder, *arguments])
        return module.main()

    return call, weights


def test_failed_trial_is_reported_and_run_again_with_other_weights(script, tmp_path, capsys):
    call, weights = script
    assert call(3) == 1
    out, err = capsys.readouterr()
    assert "failed: [1]" in err
    assert "best: 0.0333" in out
    assert weights[0] == "++objective.weights={2:1,3:1.5,4:3,6:12,8:48}"
    assert "the disk is full" in (tmp_path / "study" / "jobs" / "1" / "error.txt").read_text()
    assert (tmp_path / "study" / "summary.html").is_file()
    assert len(weights) == 3
    call(3)  # two trials are complete: one is missing
    assert len(weights) == 4
    call(3)
    assert len(weights) == 4
    assert len(set(weights)) == 4


def test_parallel_trials_are_recorded_with_their_sampler(script, tmp_path):
    call, weights = script
    output = tmp_path / "trials.json"
    call(5, "--jobs", "2", "--seed", "7", "--output", str(output), "tracking=none")
    found = json.loads(output.read_text())
    assert found["seed"] == 7
    assert found["provenance"] == {"commit": "0123abc"}
    assert found["overrides"] == ["tracking=none"]
    assert [trial["number"] for trial in found["trials"]] == list(range(5))
    assert sorted(trial["state"] for trial in found["trials"]) == ["complete"] * 4 + ["fail"]
    assert all(trial["sampler"] == {"seed": 7, "jobs": 2} for trial in found["trials"])
    assert found["trials"][0]["weights"] == {"weight_3": 1.5, "weight_4": 3.0, "weight_6": 12.0, "weight_8": 48.0}
    call(6, "--seconds", "0", "--output", str(output))  # past the deadline: no trial starts
    assert len(weights) == 5
