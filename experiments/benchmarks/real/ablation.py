"""One change of the one-shot solver at a time, on a real model: the gain of each technique of ``matgptq``.

    python experiments/benchmarks/real/ablation.py MODEL.gguf --jobs 4 --overrides runtime.device=cuda
    python experiments/benchmarks/real/ablation.py MODEL.gguf --changes "strict planes" rotation --seeds 1 2
    python experiments/benchmarks/real/ablation.py MODEL.gguf --lists          # the changes and their settings

Each row is the job of ``benchmark.py`` with the settings of its change. Records go to ``ablation/MODEL.json`` beside those of
``benchmark.py``, with their keys and ``change``; ``summary.py`` makes a table of them.
"""

import argparse
import concurrent.futures
from pathlib import Path
from typing import Any

from benchmark import job_records, merge, open_reference, origin, run_job, texts_of

NO_CORRECTION = "method.asymmetric_calibration=false"
CHANGES: dict[str, list[str]] = {
    "none": [],
    "a model per bit-width": ["method.per_bit_models=true", "method.stretch=1"],
    "no scales of their own at 2, 3, 4 bits": ["method.scale_bits=[]"],
    "strict planes": ["method.stretch=1"],
    "planes 5 to 8 longer by a half": ["method.stretch=1.5"],
    "whole correction": ["method.correction=1"],
    "no correction": [NO_CORRECTION],
    "no correction, half the weight on 8 bits": [NO_CORRECTION, "objective.weights.8=250"],
    "one stream, of 8 bits": ["method.calibration_bits=[8]"],
    "not true-sequential": ["method.true_sequential=false"],
    "no coordinate descent": ["method.cd_passes=0"],
    "4 passes of coordinate descent": ["method.cd_passes=4"],
    "no mirrored grids": ["method.zero_point_offset=0"],
    "min-max scales": ["method.scale=minmax"],
    "act-order": ["method.act_order=true"],
    "objective of equal weights": ["objective=low_bit"],
    "objective high_bit": ["objective=high_bit"],
    "twice the weight on 2 bits": ["objective.weights.2=2"],
    "twice the weight on 6 bits": ["objective.weights.6=260"],
    "damping 0.003": ["method.damp=0.003"],
    "damping 0.03": ["method.damp=0.03"],
    "twice the calibration text": ["calibration.sequences=256"],
    "rotation": ["transform=rotation"],
    "rotation, whole correction": ["transform=rotation", "method.correction=1"],
}


def ablated(given: argparse.Namespace, texts: list[str], change: str, seed: int) -> list[dict[str, Any]]:
    """Records of one job."""
    overrides = [*CHANGES[change], *given.overrides]
    results = run_job(given.model, "matgptq", seed, given.group_size, texts, overrides)
    row = {"method": "matgptq", "change": change, "refine": "none", "seed": seed, "group_size": given.group_size}
    about = {"model": given.model.stem, "evaluation_dtype": "float32", **origin()}
    return job_records(results, about | row)


def main() -> None:
    """Measure what the command line names, and record it after every job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file")
    parser.add_argument("--lists", action="store_true", help="print the changes, and do nothing else")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="CHANGE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="jobs that run at once")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings of run.py")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/real"))
    given = parser.parse_args()
    if given.lists:
        print("\n".join(f"{change}: {' '.join(settings)}" for change, settings in CHANGES.items()))
        return
    if given.model is None:
        parser.error("name a GGUF file")
    texts = list(texts_of(open_reference(given.model, "cpu")[1]))
    file = given.out / "ablation" / f"{given.model.stem}.json"
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        tasks = [(seed, change) for seed in given.seeds for change in given.changes]
        made = [pool.submit(ablated, given, texts, change, seed) for seed, change in tasks]
        failed = []
        for future in concurrent.futures.as_completed(made):
            if (error := future.exception()) is not None:
                failed.append(f"{tasks[made.index(future)]}: {error}")
                continue
            merge(file, future.result(), ("change",))
    if failed:
        raise SystemExit("\n".join(["Jobs that failed:", *failed]))


if __name__ == "__main__":
    main()
