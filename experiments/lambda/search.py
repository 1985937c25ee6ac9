"""Weights of the objective (lambda) by Optuna: which of them make the best slices, all widths together.

    python experiments/lambda/search.py --trials 20
    python experiments/lambda/search.py --trials 20 calibration.sequences=16 eval.datasets.stdlib.sequences=16

Optuna itself and not Hydra's sweeper for it, which needs an Optuna older than 3. Each trial is one job, ``python run.py`` with
its weights and the overrides given here. The study is kept in outputs/lambda: the same command goes on where it stopped, a
failed job is reported and counts as failed, and the summary is written over all jobs.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import optuna

from matquant.report import load
from matquant.report.summary import summarize

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (2, 3, 4, 6, 8)


def objective(trial: optuna.Trial, folder: Path, overrides: list[str]) -> float:
    """The geometric mean of the widths' KL: each width counts by ratio, not by size. Raises RuntimeError when the job fails."""
    weights = {2: 1.0}  # only ratios matter
    weights |= {bits: trial.suggest_float(f"weight_{bits}", 0.1, 10.0 ** (bits / 2), log=True) for bits in WIDTHS[1:]}
    given = ",".join(f"{bits}:{weight:.4g}" for bits, weight in weights.items())
    where = folder / "jobs" / str(trial.number)
    command = [sys.executable, str(ROOT / "run.py"), f"++objective.weights={{{given}}}", "objective.name=optuna",
               f"hydra.run.dir={where}", f"tracking.group={folder.name}", *overrides]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=dict(os.environ), check=False)
    if done.returncode:
        (where / "error.txt").parent.mkdir(parents=True, exist_ok=True)
        (where / "error.txt").write_text(done.stderr[-4000:])
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the job failed")
    values = [value for entry in load(where)["slices"] for value in entry["kl"].values()]
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier runs included")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "lambda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="lambda", storage=f"sqlite:///{folder}/study.db", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=arguments.seed),
    )  # fmt: skip
    if not study.trials:  # the shipped preset is the first to beat
        study.enqueue_trial({"weight_3": 1.5, "weight_4": 3.0, "weight_6": 12.0, "weight_8": 48.0})
    done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    study.optimize(
        lambda trial: objective(trial, folder, arguments.overrides), n_trials=max(arguments.trials - done, 0),
        catch=(RuntimeError,),
    )  # fmt: skip
    summarize(folder)
    failed = [trial.number for trial in study.trials if trial.state == optuna.trial.TrialState.FAIL]
    if failed:
        print(f"failed: {failed}; see error.txt in their folders", file=sys.stderr)
    if len(failed) < len(study.trials):
        print(f"best: {study.best_value:.5g} with {study.best_params}\nsummary: {folder / 'summary.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
