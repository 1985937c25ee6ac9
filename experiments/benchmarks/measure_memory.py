"""Measures whether memory grows with depth, and whether the plan was right, on random Llamas of the 8B shape and a CPU.

    python experiments/benchmarks/measure_memory.py FOLDER --out memory.json --width 1 --blocks 2,4,8
    python experiments/benchmarks/measure_memory.py FOLDER --out memory.json --width 0.125 --blocks 2,8 method.cd_passes=0

Makes each model in FOLDER if it is not there, quantizes and measures it in processes of their own, and prints a line for
each: the peak that the plan gave, the peak resident memory of the process, and seconds. Further arguments are overrides.

The JSON is written anew after each line. No stage lives beyond ``--seconds`` of the whole run: one that was ended has no line,
and the same command goes on at the block where it stopped.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from make_llama import INDEX, make

from matquant import machine

ROOT = Path(__file__).resolve().parents[2]


def run(model: Path, work: Path, stage: str, overrides: list[str], seconds: float) -> dict:
    """The results of one stage, run as a process of its own; raises subprocess.TimeoutExpired after so many seconds."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"model.path={model}",
        f"stages=[{stage}]",
        "tracking=none",
        f"store.path={work}/store",
        f"hydra.run.dir={work}/run",
        "runtime.device=cpu",
        "calibration.sequences=32",
        "eval.datasets.stdlib.sequences=8",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=max(seconds, 1))
    return json.loads((work / "run" / "results.json").read_text())


def line(blocks: int, stage: str, results: dict) -> dict:
    """What one stage planned and took: bytes and seconds."""
    found = results["resources"]
    planned = found["plan"]["host_peak"] if found["plan"] else None
    return {
        "blocks": blocks,
        "stage": stage,
        "planned": planned,
        "measured": found["host_peak"],
        "seconds": results["seconds"][stage],
    }


def shown(row: dict) -> str:
    planned = "?" if row["planned"] is None else f"{row['planned'] / 1e6:.0f}"
    return f"| {row['blocks']} | {row['stage']} | {planned} | {row['measured'] / 1e6:.0f} | {row['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--blocks", default="2,4,8")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the whole run")
    arguments, overrides = parser.parse_known_args()
    end = time.monotonic() + arguments.seconds
    about = {
        "overrides": overrides,
        "width": arguments.width,
        "vocabulary": arguments.vocabulary,
        "cores": machine.cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows: list[dict] = []
    print("| blocks | stage | planned, MB | measured, MB | seconds |\n|---|---|---|---|---|")
    for blocks in map(int, arguments.blocks.split(",")):
        model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{blocks}"
        if not (model / INDEX).is_file():
            make(model, blocks, arguments.width, arguments.vocabulary)
        for stage in ("quantize", "evaluate"):
            try:
                results = run(model, arguments.folder / f"work-{blocks}", stage, overrides, end - time.monotonic())
            except subprocess.TimeoutExpired:
                sys.exit(f"{stage} of {blocks} blocks was ended: the time is over")
            rows.append(line(blocks, stage, results))
            print(shown(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
