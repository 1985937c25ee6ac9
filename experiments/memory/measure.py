"""Measures whether memory grows with depth, and whether the plan was right, on random Llamas of the 8B shape.

    python experiments/memory/measure.py FOLDER --width 1 --blocks 2,4,8
    python experiments/memory/measure.py FOLDER --width 0.125 --blocks 2,8 method.sweeps=0

Makes each model in FOLDER if it is not there, quantizes and measures it in processes of their own, and prints a line for
each: the peak that the plan gave, the peak resident memory of the process, and seconds. Further arguments are overrides.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "scale"))

from make_llama import make  # noqa: E402  (a script beside this one, found through the line above)


def run(model: Path, work: Path, stage: str, overrides: list[str]) -> dict:
    """The results of one stage, run as a process of its own."""
    command = [
        sys.executable, str(ROOT / "run.py"), f"model.path={model}", f"stages=[{stage}]", "tracking=none",
        f"store.path={work}/store", f"hydra.run.dir={work}/run", "calibration.sequences=32",
        "eval.datasets.stdlib.sequences=8", *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / "run" / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--blocks", default="2,4,8")
    arguments, overrides = parser.parse_known_args()
    print("| blocks | stage | planned, MB | measured, MB | seconds |\n|---|---|---|---|---|")
    for blocks in map(int, arguments.blocks.split(",")):
        model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{blocks}"
        if not (model / "model.safetensors.index.json").is_file():
            make(model, blocks, arguments.width, arguments.vocabulary)
        for stage in ("quantize", "evaluate"):
            results = run(model, arguments.folder / f"work-{blocks}", stage, overrides)
            found = results["resources"]
            planned = found["plan"]["host_peak"] / 1e6 if found["plan"] else float("nan")
            seconds = results["seconds"][stage]
            print(
                f"| {blocks} | {stage} | {planned:.0f} | {found['host_peak'] / 1e6:.0f} | {seconds:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
