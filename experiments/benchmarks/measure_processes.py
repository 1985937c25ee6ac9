"""Quantize and evaluate the shipped model in one process and in two, one thread each; compare times and results.

    python experiments/benchmarks/measure_processes.py --out processes.json

CPU seconds are those of the busiest process: they show the division of work even if other programs use the cores.
"""

import argparse
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

from matquant.report.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]


def watch_cpu_seconds(process: psutil.Process, seconds: dict[int, float], stop: threading.Event) -> None:
    """Record the CPU seconds of a process and its descendants by process id, until ``stop`` is set."""
    while not stop.wait(0.2):
        for one in (process, *process.children(recursive=True)):
            try:
                seconds[one.pid] = sum(one.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue


def run(processes: int, overrides: list[str]) -> dict[str, Any]:
    """Times and results of one job."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        settings = ["tracking=none", f"hydra.run.dir={folder}/run", f"store.path={folder}/store"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        command = [sys.executable, *launcher, str(ROOT / "run.py"), *settings, *overrides]
        job = subprocess.Popen(command, env=environment)
        cpu_seconds: dict[int, float] = {}
        stop = threading.Event()
        watcher = threading.Thread(target=watch_cpu_seconds, args=(psutil.Process(job.pid), cpu_seconds, stop))
        watcher.start()
        status = job.wait()
        seconds = time.perf_counter() - start
        stop.set()
        watcher.join()
        if status:
            sys.exit(status)
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    return {
        "processes": processes,
        "seconds": seconds,
        "stages": {stage: results["seconds"][stage] for stage in ("load", "quantize", "evaluate")},
        "busiest": max(cpu_seconds.values()),
        "kl": {str(entry["bits"]): entry["kl"]["stdlib"] for entry in results["slices"]},
        "parent": results["parent"]["sha256"],
    }


def main() -> None:
    """Run both jobs, print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments, overrides = parser.parse_known_args()
    one, two = (run(processes, overrides) for processes in (1, 2))
    ratios = {name: two[name] / one[name] for name in ("seconds", "busiest")}
    ratios |= {stage: two["stages"][stage] / one["stages"][stage] for stage in ("quantize", "evaluate")}
    record = {
        "provenance": provenance(),
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
