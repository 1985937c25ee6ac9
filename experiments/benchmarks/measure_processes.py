"""Quantizes and measures the shipped model in one process and in two, a thread each, and compares time and results.

    python experiments/benchmarks/measure_processes.py --out processes.json

Seconds of the processor are of the busiest process, so that they tell of sharing even where other work runs on the cores.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def busiest(process: psutil.Process, found: dict[int, float], stop: threading.Event) -> None:
    """Note the processor's seconds of a process and its children, until told to stop."""
    while not stop.wait(0.2):
        for one in (process, *process.children(recursive=True)):
            try:
                found[one.pid] = sum(one.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue


def run(processes: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds and results of one job."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        places = ["tracking=none", f"hydra.run.dir={folder}/run", f"store.path={folder}/store"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        job = subprocess.Popen([sys.executable, *launcher, str(ROOT / "run.py"), *places, *overrides], env=environment)
        found: dict[int, float] = {}
        stop = threading.Event()
        watcher = threading.Thread(target=busiest, args=(psutil.Process(job.pid), found, stop))
        watcher.start()
        status = job.wait()
        seconds = time.perf_counter() - start
        stop.set()
        watcher.join()
        if status:
            sys.exit(status)
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    kl = {str(entry["bits"]): entry["kl"]["stdlib"] for entry in results["slices"]}
    stages = {stage: results["seconds"][stage] for stage in ("load", "quantize", "evaluate")}
    return {
        "processes": processes,
        "seconds": seconds,
        "stages": stages,
        "busiest": max(found.values()),
        "kl": kl,
        "parent": results["parent"]["sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments, overrides = parser.parse_known_args()
    one, two = (run(processes, overrides) for processes in (1, 2))
    ratios = {what: two[what] / one[what] for what in ("seconds", "busiest")}
    ratios |= {stage: two["stages"][stage] / one["stages"][stage] for stage in ("quantize", "evaluate")}
    record = {
        "date": datetime.date.today().isoformat(),
        "overrides": overrides,
        "runs": [one, two],
        "ratios": ratios,
        "largest difference of KL": max(abs(two["kl"][b] / one["kl"][b] - 1) for b in one["kl"]),
        "same parent": one["parent"] == two["parent"],
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
