"""Measure each technique of the solver alone and together, on one model.

    python experiments/benchmarks/solver_ablation.py runtime.device=cuda

Every row of the table is a job, `python run.py` with the overrides of that row. Rows run in parallel processes with one
thread each. Writes results.json and results.png, and prints the table.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

BIT_WIDTHS = (2, 3, 4, 6, 8)

# Baselines: one model per bit-width.
BASELINES = {
    "round to nearest": ["method=rtn"],
    "GPTQ, min-max scales": ["method=gptq"],
    "GPTQ, scale search, zero on the grid": ["method=gptq", "method.scale=search"],
    "GPTQ, scale search, half-step grid": ["method=gptq", "method.scale=search", "method.slicing=msb"],
}
NO_PASSES = ["method.cd_passes=0"]
NO_OFFSET = ["method.zero_point_offset=0"]
ONE_PARENT_STREAM = [
    "method.calibration_bits=[]",
    "method.asymmetric_calibration=false",
    "method.true_sequential=false",
]
ALL = "all: + one stream per slice, asymmetric calibration"
NESTED = {
    "MatGPTQ v1": ["method=matgptq_v1"],
    "one target per bit-width, min-max scales": [*ONE_PARENT_STREAM, *NO_OFFSET, *NO_PASSES, "method.scale=minmax"],
    "+ scale search": [*ONE_PARENT_STREAM, *NO_OFFSET, *NO_PASSES],
    "+ 2 coordinate-descent passes": [*ONE_PARENT_STREAM, *NO_OFFSET],
    "+ mirrored grids": ONE_PARENT_STREAM,
    ALL: [],
}
# One change of ``ALL`` each.
SINGLE_CHANGES = {
    "all, no coordinate descent": NO_PASSES,
    "all, 1 pass": ["method.cd_passes=1"],
    "all, 4 passes": ["method.cd_passes=4"],
    "all, no mirrored grids": NO_OFFSET,
    "all, zero-point offset 4": ["method.zero_point_offset=4"],
    "all, zero-point offset 12": ["method.zero_point_offset=12"],
    "all, min-max scales": ["method.scale=minmax"],
    "all, symmetric calibration": ["method.asymmetric_calibration=false"],
    "all, not true-sequential": ["method.true_sequential=false"],
    "all, one stream (8 bits)": ["method.calibration_bits=[8]"],
    "all, streams of 2 and 8 bits": ["method.calibration_bits=[2,8]"],
    "all, also a stream of 6 bits": ["method.calibration_bits=[2,3,4,6,8]"],
    "all, act-order": ["method.act_order=true"],
    "all, zero points": ["method.symmetric=false", *NO_OFFSET],
    "all, round slices": ["method.slicing=round", *NO_OFFSET],
    "all, damping 0.003": ["method.damp=0.003"],
    "all, damping 0.03": ["method.damp=0.03"],
    "all, group size 64": ["method.group_size=64"],
    "all, 16 k calibration tokens": ["calibration.sequences=32"],
    "all, 65 k calibration tokens": ["calibration.sequences=128"],
    "all, objective uniform": ["objective=uniform"],
    "all, objective low_bit": ["objective=low_bit"],
    "all, objective high_bit": ["objective=high_bit"],
}

# Rows in the plot, and their labels there.
PLOTTED = {
    "round to nearest": "round to nearest, one model per bit-width",
    "GPTQ, min-max scales": "GPTQ, one model per bit-width",
    "GPTQ, scale search, half-step grid": "GPTQ, scale search, one model per bit-width",
    "MatGPTQ v1": "MatGPTQ v1, one parent",
    ALL: "matgptq, one parent",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: overrides, and the seed of the calibration sequences."""

    name: str
    overrides: tuple[str, ...]
    seed: int


def measure(task: tuple[Row, tuple[str, ...], str]) -> dict[str, Any]:
    """Run one row in a process of its own."""
    row, common, store = task
    from hydra import compose, initialize_config_dir

    from matquant import cli
    from matquant.config import from_hydra
    from matquant.stages.job import JobInfo, compute

    cli.register()
    overrides = [*common, *row.overrides, f"calibration.seed={row.seed}"]
    fixed = [f"store.path={store}", "bits=[2,3,4,6,8]", "tracking=none", "runtime.threads=1", "runtime.progress=false"]
    with initialize_config_dir(str(cli.resource_root() / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", [*overrides, *fixed]))
    info = JobInfo(folder=Path(store), command="", name=row.name, group=None, resolved={})
    results = compute(config, info)
    assert results is not None  # one process
    dataset = next(iter(results.baseline.perplexity))
    kl = {str(one.bits): one.kl[dataset] for one in results.slices}
    print(f"{row.name} (seed {row.seed}): " + " ".join(f"{b}: {v:.5f}" for b, v in kl.items()), flush=True)
    seconds = results.seconds["quantize"]
    return {"name": row.name, "overrides": overrides, "seed": row.seed, "kl": kl, "seconds_quantize": seconds}


def rows(seeds: Sequence[int]) -> list[Row]:
    """Rows: baselines and cumulative techniques for every seed, single changes for the first seed."""
    compared = {**BASELINES, **NESTED}
    return [Row(name, tuple(o), seed) for seed in seeds for name, o in compared.items()] + [
        Row(name, tuple(o), seeds[0]) for name, o in SINGLE_CHANGES.items()
    ]


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown table: mean KL over the seeds of each row at each bit-width, and mean seconds."""
    lines = ["| | 2 | 3 | 4 | 6 | 8 bits | s |", "|---|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(m["name"] for m in measured))
    for name in names:
        runs = [m for m in measured if m["name"] == name]
        means = [statistics.mean(run["kl"][str(b)] for run in runs) for b in BIT_WIDTHS]
        seconds = statistics.mean(run["seconds_quantize"] for run in runs)
        lines.append(f"| {name} | " + " | ".join(_short(v) for v in means) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def draw(measured: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot of the README: KL against bits of our parent, of MatGPTQ v1's parent, and of the baseline models."""
    from matquant.report import drawing, plots

    lines = []
    for name, label in PLOTTED.items():
        runs = [m for m in measured if m["name"] == name]
        points = tuple((float(b), statistics.mean(run["kl"][str(b)] for run in runs)) for b in BIT_WIDTHS)
        lines.append(plots.Series(label, points))
    figure = plots.kl_figure(lines, "bits")
    if figure is not None:
        path.write_bytes(drawing.to_png(figure))


def _short(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def main() -> None:
    """Measure all rows and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of every row, such as model.path=FOLDER or runtime.device=cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "solver" / "results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        tasks = [(row, tuple(args.overrides), store) for row in rows(args.seeds)]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            measured = pool.map(measure, tasks, chunksize=1)
    from matquant.report.provenance import provenance

    record = {"provenance": provenance(), "rows": measured}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(measured))
    draw(measured, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
