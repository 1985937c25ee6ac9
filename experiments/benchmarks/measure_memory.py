"""Compare the planned with the measured memory of jobs on random Llamas of the 8B shape and several depths, on a CPU.

    python experiments/benchmarks/measure_memory.py FOLDER --out memory.json --width 1 --blocks 2,4,8
    python experiments/benchmarks/measure_memory.py FOLDER --out memory.json --width 0.125 --blocks 2,8 method.cd_passes=0

Makes each model in FOLDER if it is missing. The stages quantize and evaluate run in processes of their own. Each prints a line:
planned peak, measured peak of resident memory, and seconds. Further arguments are overrides of the config.

The JSON is rewritten after each line. ``--seconds`` limits the whole run: a stage that exceeds it is stopped and has no line;
the same command resumes it at the block where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from make_llama import INDEX, make

from matquant.report.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]


def run_stage(model: Path, work: Path, stage: str, overrides: list[str], seconds: float) -> dict:
    """Results of one stage, run as a process. Raises subprocess.TimeoutExpired after ``seconds``."""
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


def make_row(blocks: int, stage: str, results: dict) -> dict:
    """Planned and measured bytes, and seconds, of one stage."""
    resources = results["resources"]
    return {
        "blocks": blocks,
        "stage": stage,
        "planned": resources["plan"]["host_peak"] if resources["plan"] else None,
        "measured": resources["host_peak"],
        "seconds": results["seconds"][stage],
    }


def markdown(row: dict) -> str:
    """Line of the table."""
    planned = "?" if row["planned"] is None else f"{row['planned'] / 1e6:.0f}"
    return f"| {row['blocks']} | {row['stage']} | {planned} | {row['measured'] / 1e6:.0f} | {row['seconds']:.0f} |"


def main() -> None:
    """Measure all models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=float, default=1.0, help="factor on all sizes of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--blocks", default="2,4,8")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit of the whole run")
    arguments, overrides = parser.parse_known_args()
    end = time.monotonic() + arguments.seconds
    about = {
        "provenance": provenance(),
        "overrides": overrides,
        "width": arguments.width,
        "vocabulary": arguments.vocabulary,
    }
    rows: list[dict] = []
    print("| blocks | stage | planned, MB | measured, MB | seconds |\n|---|---|---|---|---|")
    for blocks in map(int, arguments.blocks.split(",")):
        model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{blocks}"
        if not (model / INDEX).is_file():
            make(model, blocks, arguments.width, arguments.vocabulary)
        for stage in ("quantize", "evaluate"):
            try:
                results = run_stage(
                    model, arguments.folder / f"work-{blocks}", stage, overrides, end - time.monotonic()
                )
            except subprocess.TimeoutExpired:
                sys.exit(f"{stage} of {blocks} blocks was stopped after --seconds; the same command resumes it")
            rows.append(make_row(blocks, stage, results))
            print(markdown(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
