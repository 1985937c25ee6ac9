"""Run a job on idle cores and beside one busy process per core, in alternation; compare the times.

    python experiments/benchmarks/measure_contention.py --out contention.json
    python experiments/benchmarks/measure_contention.py --out contention.json --environment GOMP_SPINCOUNT=300000

The first setting is the project's own. Each ``--environment`` adds one, such as OpenMP's default of spinning for
milliseconds. Other programs on the machine disturb the wall time, so the least of all rounds counts; user seconds show the
time spent spinning.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matquant.report.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with a process of its own inside the context."""
    processes = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(environment: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Times and parent of one job."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["tracking=none", f"hydra.run.dir={folder}/run", f"store.path={folder}/store"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, str(ROOT / "run.py"), *settings, *overrides]
        status = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL).returncode
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if status:
            sys.exit(status)
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    return {
        "seconds": round(seconds, 2),
        "user_seconds": round(after.ru_utime - before.ru_utime, 2),
        "system_seconds": round(after.ru_stime - before.ru_stime, 2),
        "stages": {stage: results["seconds"][stage] for stage in ("load", "quantize", "evaluate")},
        "parent": results["parent"]["sha256"],
    }


def measure(settings: list[dict[str, str]], rounds: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Times of every setting, idle and contended, in each round."""
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        for environment in settings:
            for contended in (False, True):
                with busy_cores() if contended else contextlib.nullcontext():
                    row = {"round": number, "environment": environment, "contended": contended}
                    rows.append(row | run(environment, overrides))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def summarize(environment: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least times of one setting over all rounds, and their ratio."""
    least = {
        name: {
            key: min(row[key] for row in rows if row["environment"] == environment and row["contended"] == contended)
            for key in ("seconds", "user_seconds")
        }
        for name, contended in (("idle", False), ("contended", True))
    }
    ratio = least["contended"]["seconds"] / least["idle"]["seconds"]
    return {"environment": environment, **least, "ratio": round(ratio, 3)}


def main() -> None:
    """Measure all settings, print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", action="append", default=[], help="variables of one more setting: A=1,B=2")
    arguments, overrides = parser.parse_known_args()
    given = [dict(pair.split("=", 1) for pair in text.split(",")) for text in arguments.environment]
    settings: list[dict[str, str]] = [{}, *given]
    rows = measure(settings, arguments.rounds, overrides)
    record = {
        "provenance": provenance(),
        "overrides": overrides,
        "runs": rows,
        "settings": [summarize(environment, rows) for environment in settings],
        "same parent": len({row["parent"] for row in rows}) == 1,
    }
    for summary in record["settings"]:
        print(json.dumps(summary))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
