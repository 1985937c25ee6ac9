"""Each trick of the solver alone and together, on one model: python experiments/benchmarks/solver_ablation.py --help

Every row of the table is `python run.py` with the overrides that stand in it. Rows run in parallel processes, one thread each.
"""

import argparse
import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

WIDTHS = (2, 3, 4, 6, 8)

# The bars: one model per width.
DEDICATED = {
    "round to nearest": ["method=rtn"],
    "GPTQ, min-max scales": ["method=gptq"],
    "GPTQ, searched scales, zero on the grid": ["method=gptq", "method.scale=search"],
    "GPTQ, searched scales, half-step grid": ["method=gptq", "method.scale=search", "method.slicing=msb"],
}
PLAIN = ["method.calibration_bits=[]", "method.asymmetric_calibration=false", "method.true_sequential=false", "method.zero_point_offset=0", "method.cd_passes=0"]
NESTED = {
    "MatGPTQ v1": ["method=matgptq_v1"],
    "one target per width, min-max scales": [*PLAIN, "method.scale=minmax"],
    "+ searched scales": PLAIN,
    "+ two sweeps": [o for o in PLAIN if "sweeps" not in o],
    "+ mirrored grids": [o for o in PLAIN if "sweeps" not in o and "offset" not in o],
    "all: + a stream per slice, asymmetric": [],
}
WITHOUT = {
    "all, no sweep": ["method.cd_passes=0"],
    "all, one sweep": ["method.cd_passes=1"],
    "all, four sweeps": ["method.cd_passes=4"],
    "all, no mirrored grids": ["method.zero_point_offset=0"],
    "all, offset 4": ["method.zero_point_offset=4"],
    "all, offset 12": ["method.zero_point_offset=12"],
    "all, min-max scales": ["method.scale=minmax"],
    "all, symmetric calibration": ["method.asymmetric_calibration=false"],
    "all, not staged": ["method.true_sequential=false"],
    "all, one stream (8 bits)": ["method.calibration_bits=[8]"],
    "all, streams of 2 and 8 bits": ["method.calibration_bits=[2,8]"],
    "all, a stream for 6 bits too": ["method.calibration_bits=[2,3,4,6,8]"],
    "all, act_order": ["method.act_order=true"],
    "all, zero points": ["method.symmetric=false", "method.zero_point_offset=0"],
    "all, round slices": ["method.slicing=round", "method.zero_point_offset=0"],
    "all, damping 0.003": ["method.damp=0.003"],
    "all, damping 0.03": ["method.damp=0.03"],
    "all, group size 64": ["method.group_size=64"],
    "all, 16 k calibration tokens": ["calibration.sequences=32"],
    "all, 65 k calibration tokens": ["calibration.sequences=128"],
    "all, objective uniform": ["objective=uniform"],
    "all, objective low_bit": ["objective=low_bit"],
    "all, objective high_bit": ["objective=high_bit"],
}


# Rows in the plot, and what it calls them.
DRAWN = {
    "round to nearest": "round to nearest, a model per width",
    "GPTQ, min-max scales": "GPTQ, a model per width",
    "GPTQ, searched scales, half-step grid": "GPTQ, searched scales, a model per width",
    "MatGPTQ v1": "MatGPTQ v1, one parent",
    "all: + a stream per slice, asymmetric": "matgptq, one parent",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a set of overrides, and a seed that draws the calibration windows."""

    name: str
    overrides: tuple[str, ...]
    seed: int


def measure(task: tuple[Row, tuple[str, ...], str]) -> dict[str, Any]:
    """Run one row; called in a process of its own."""
    row, common, store = task
    from hydra import compose, initialize_config_dir

    from matquant import cli, pipeline
    from matquant.config import from_hydra

    cli.register()
    overrides = [*common, *row.overrides, f"calibration.seed={row.seed}"]
    fixed = [f"store.path={store}", "bits=[2,3,4,6,8]", "tracking=none", "runtime.threads=1", "runtime.progress=false"]
    with initialize_config_dir(str(cli.resource_root() / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", [*overrides, *fixed]))
    job = pipeline.Job(folder=Path(store), command="", name=row.name, group=None, resolved={})
    results = pipeline.compute(config, job)
    dataset = next(iter(results["baseline"]["perplexity"]))
    kl = {str(entry["bits"]): entry["kl"][dataset] for entry in results["slices"]}
    print(f"{row.name} (seed {row.seed}): " + " ".join(f"{b}: {v:.5f}" for b, v in kl.items()), flush=True)
    seconds = results["seconds"]["quantize"]
    return {"name": row.name, "overrides": overrides, "seed": row.seed, "kl": kl, "seconds_quantize": seconds}


def rows(seeds: Sequence[int]) -> list[Row]:
    """What is compared on every seed, and what on the first only."""
    compared = {**DEDICATED, **NESTED}
    return [Row(name, tuple(o), seed) for seed in seeds for name, o in compared.items()] + [
        Row(name, tuple(o), seeds[0]) for name, o in WITHOUT.items()
    ]


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean KL over the seeds of each row and width, and seconds of one thread."""
    lines = ["| | 2 | 3 | 4 | 6 | 8 bits | s |", "|---|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(m["name"] for m in measured))
    for name in names:
        runs = [m for m in measured if m["name"] == name]
        means = [statistics.mean(run["kl"][str(b)] for run in runs) for b in WIDTHS]
        seconds = statistics.mean(run["seconds_quantize"] for run in runs)
        lines.append(f"| {name} | " + " | ".join(_short(v) for v in means) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def draw(measured: Sequence[dict[str, Any]], path: Path) -> None:
    """The README's plot: KL against bits of our parent, MatGPTQ v1's, and the dedicated models of every width."""
    from matquant.report import drawing, plots

    lines = []
    for name, label in DRAWN.items():
        runs = [m for m in measured if m["name"] == name]
        points = tuple((float(b), statistics.mean(run["kl"][str(b)] for run in runs)) for b in WIDTHS)
        lines.append(plots.Series(label, points))
    figure = plots.kl_figure(lines, "bits")
    if figure is not None:
        path.write_bytes(drawing.to_png(figure))


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _short(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="for every row, such as model.path=FOLDER or runtime.device=cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "solver" / "results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        tasks = [(row, tuple(args.overrides), store) for row in rows(args.seeds)]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            measured = pool.map(measure, tasks, chunksize=1)
    record = {
        "command": " ".join(["python", "experiments/benchmarks/solver_ablation.py", *args.overrides]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{_accelerator()}, {os.cpu_count()} cores",
        "text": f"Python {platform.python_version()}",
        "rows": measured,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(measured))
    draw(measured, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
