"""Weights of the objective (lambda) by Optuna: which of them make the best slices, all widths together.

    python experiments/benchmarks/lambda_search.py --trials 20
    python experiments/benchmarks/lambda_search.py --trials 16 --jobs 8 --seconds 120 tracking=none    # a GPU with some cores
    python experiments/benchmarks/lambda_search.py --trials 20 calibration.sequences=16 eval.datasets.stdlib.sequences=16

Optuna itself and not Hydra's sweeper for it, which needs an Optuna older than 3. Each trial is one job, ``python run.py`` with
its weights and the overrides given here. The study is kept in outputs/lambda: the same command goes on where it stopped, a
failed job is reported and counts as failed, and the summary is written over all jobs. trials.json has every trial's weights,
value and the sampler's seed. With several jobs at a time the weights of a trial depend on which ones ended before it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from matquant.report import load
from matquant.report.output_files import write_atomic
from matquant.report.provenance import provenance
from matquant.report.summary import summarize

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (2, 3, 4, 6, 8)
PRESET = {"weight_3": 1.5, "weight_4": 3.0, "weight_6": 12.0, "weight_8": 48.0}  # with 1 for 2 bits


def objective(trial: optuna.Trial, folder: Path, overrides: list[str], threads: int) -> float:
    """The geometric mean of the widths' KL: each width counts by ratio, not by size. Raises RuntimeError when the job fails."""
    weights = {2: 1.0}  # only ratios matter
    weights |= {bits: trial.suggest_float(f"weight_{bits}", 0.1, 10.0 ** (bits / 2), log=True) for bits in WIDTHS[1:]}
    given = ",".join(f"{bits}:{weight:.4g}" for bits, weight in weights.items())
    where = folder / "jobs" / str(trial.number)
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"++objective.weights={{{given}}}",
        "objective.name=optuna",
        f"hydra.run.dir={where}",
        f"tracking.group={folder.name}",
        *overrides,
    ]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        (where / "error.txt").parent.mkdir(parents=True, exist_ok=True)
        (where / "error.txt").write_text(done.stderr[-4000:])
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the job failed")
    values = [value for one in load(where).slices for value in one.kl.values()]
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))


def open_study(folder: Path, seed: int) -> tuple[optuna.Study, int]:
    """The study in a folder, with the preset as the first to beat; and the seed of what it draws from now on.

    A study that goes on must not draw again what it drew at first.
    """
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(study_name="lambda", storage=storage, load_if_exists=True)
    if not study.trials:
        study.enqueue_trial(PRESET)
    seed += sum(trial.state != TrialState.WAITING for trial in study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return study, seed


def record(study: optuna.Study, path: Path, about: dict[str, object]) -> None:
    """Write down every trial."""
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "weights": trial.params,
            "sampler": trial.user_attrs,
        }
        for trial in study.trials
    ]
    write_atomic(path, json.dumps(about | {"trials": trials}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier runs included")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--seconds", type=float, help="after which no trial begins")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "lambda")
    parser.add_argument("--output", type=Path, help="of the trials; trials.json in the folder if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    output = arguments.output or folder / "trials.json"
    study, seed = open_study(folder, arguments.seed)
    sampler = {"seed": seed, "jobs": arguments.jobs}
    about = {"provenance": provenance(), "seed": arguments.seed, "overrides": arguments.overrides}
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)

    def run(trial: optuna.Trial) -> float:
        for key, value in sampler.items():
            trial.set_user_attr(key, value)
        return objective(trial, folder, arguments.overrides, threads)

    done = sum(trial.state == TrialState.COMPLETE for trial in study.trials)
    study.optimize(
        run,
        n_trials=max(arguments.trials - done, 0),
        n_jobs=arguments.jobs,
        timeout=arguments.seconds,
        catch=(RuntimeError,),
        callbacks=[lambda study, _: record(study, output, about)],
    )
    record(study, output, about)  # of trials that ended together, one may have written over another
    summarize(folder)
    failed = [trial.number for trial in study.trials if trial.state == TrialState.FAIL]
    if failed:
        print(f"failed: {failed}; see error.txt in their folders", file=sys.stderr)
    if any(trial.state == TrialState.COMPLETE for trial in study.trials):
        print(f"best: {study.best_value:.5g} with {study.best_params}\nsummary: {folder / 'summary.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
