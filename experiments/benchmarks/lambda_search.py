"""Search for the weights of the objective (lambda) with Optuna, by the mean KL of all slices.

    python experiments/benchmarks/lambda_search.py --trials 20
    python experiments/benchmarks/lambda_search.py --trials 16 --jobs 8 --seconds 120 tracking=none    # for a GPU
    python experiments/benchmarks/lambda_search.py --trials 20 calibration.sequences=16 eval.datasets.stdlib.sequences=16

Uses Optuna itself, because Hydra's Optuna sweeper needs an Optuna older than version 3. Each trial is one job: ``python
run.py`` with its weights and the given overrides. The study is stored in outputs/lambda, and the same command resumes
it. A failed job is reported and counts as a failed trial. The summary covers all jobs. trials.json has the weights and
the value of every trial, and the seed of the sampler. With parallel jobs, the weights of a trial depend on the trials
that ended before it.
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
BITS = (2, 3, 4, 6, 8)
# Weights of objective=balanced; 2 bits have weight 1.
PRESET = {"weight_3": 1.5, "weight_4": 3.0, "weight_6": 12.0, "weight_8": 48.0}


def objective(trial: optuna.Trial, folder: Path, overrides: list[str], threads: int) -> float:
    """Run one job and return the geometric mean of its slices' KL, in which ratios count, not absolute values.

    Raises:
        RuntimeError: the job failed.
    """
    weights = {2: 1.0}  # only ratios matter
    weights |= {bits: trial.suggest_float(f"weight_{bits}", 0.1, 10.0 ** (bits / 2), log=True) for bits in BITS[1:]}
    given = ",".join(f"{bits}:{weight:.4g}" for bits, weight in weights.items())
    job_folder = folder / "jobs" / str(trial.number)
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"++objective.weights={{{given}}}",
        "objective.name=optuna",
        f"hydra.run.dir={job_folder}",
        f"tracking.group={folder.name}",
        *overrides,
    ]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        job_folder.mkdir(parents=True, exist_ok=True)
        (job_folder / "error.txt").write_text(done.stderr[-4000:])
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the job failed")
    values = [value for one in load(job_folder).slices for value in one.kl.values()]
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))


def open_study(folder: Path, seed: int) -> tuple[optuna.Study, int]:
    """Open or create the study of a folder; a new study starts with the preset.

    Returns:
        The study, and the seed of its sampler. A resumed study has another seed, so that it does not repeat its first
        trials.
    """
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(study_name="lambda", storage=storage, load_if_exists=True)
    if not study.trials:
        study.enqueue_trial(PRESET)
    seed += sum(trial.state != TrialState.WAITING for trial in study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return study, seed


def record(study: optuna.Study, path: Path, about: dict[str, object]) -> None:
    """Write all trials to a JSON file."""
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
    parser.add_argument("--trials", type=int, default=20, help="total number, earlier runs included")
    parser.add_argument("--jobs", type=int, default=1, help="parallel trials")
    parser.add_argument("--seconds", type=float, help="start no trial after this time")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "lambda")
    parser.add_argument("--output", type=Path, help="file of the trials; default: trials.json in the folder")
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
    record(study, output, about)  # parallel trials may have overwritten each other's record
    summarize(folder)
    failed = [trial.number for trial in study.trials if trial.state == TrialState.FAIL]
    if failed:
        print(f"failed: {failed}; see error.txt in their folders", file=sys.stderr)
    if any(trial.state == TrialState.COMPLETE for trial in study.trials):
        print(f"best: {study.best_value:.5g} with {study.best_params}\nsummary: {folder / 'summary.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
