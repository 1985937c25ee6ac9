"""Times the nested solver against the published algorithm (MatGPTQ v1, arXiv 2602.03537) as a plain torch column loop.

    make bench-solver                                   # 1024x1024 and 2048x2048
    .venv/bin/python experiments/benchmarks/bench_solver.py --sizes 4096x4096,4096x14336 --out bench.json

Sizes are rows x columns of one layer: random weights, correlated inputs, five widths, groups of 128, two threads. The
baseline of a large layer runs over its first columns only, and its time is scaled up to all of them.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight, WeightFormat, slice_codes
from matquant.quantize.gptq.solver import Calibration, Inputs, SolverOptions, calibrate, relative_error, solve

WIDTHS = {2: 1.0, 3: 2.0, 4: 4.0, 6: 16.0, 8: 64.0}
GROUP_SIZE = 128
LARGEST_BASELINE = 2048 * 2048  # weights; of larger layers the baseline solves only the first columns
NOTE = "Large layers: --sizes 4096x4096,4096x14336 (rows x columns; the last needs minutes and gigabytes)."

OURS = {
    "(b) ours, min-max scales": SolverOptions(weights=WIDTHS, group_size=GROUP_SIZE, scale="minmax"),
    "(c) ours, scale search": SolverOptions(weights=WIDTHS, group_size=GROUP_SIZE),
    "(d) ours, scale search, a sweep": SolverOptions(weights=WIDTHS, group_size=GROUP_SIZE, sweeps=1),
    "(e) ours, the default: mirrored grids, 2 sweeps": SolverOptions(
        weights=WIDTHS, group_size=GROUP_SIZE, offset=8.0, sweeps=2
    ),
}
BASELINE = "(a) MatGPTQ v1, its column loop in torch"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: the least seconds of all repeats, and of (a) how many columns were timed."""

    rows: int
    columns: int
    what: str
    seconds: float
    faster: float
    timed_columns: int
    errors: dict[int, float] | None


def published(weight: Tensor, factor: Tensor, columns: int, block_size: int = 128) -> NestedWeight:
    """The first ``columns`` columns by the published algorithm, with the published code's work for each of them: all 256
    candidates of every row are sliced, decoded and compared at every width, and the plain mean of the widths' errors is
    fed back into one shared target.

    Args:
        weight: float32 [rows, all columns].
        factor: float32 [all columns, all columns], upper Cholesky factor of the inverse Hessian.
    """
    target, rows = weight.clone(), len(weight)
    candidates = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, rows)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(rows, columns // GROUP_SIZE)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        errors = torch.zeros(rows, last - first)
        for j in range(first, last):
            if j % GROUP_SIZE == 0:
                group = target[:, j : j + GROUP_SIZE].abs().amax(1)
                scales[:, j // GROUP_SIZE] = (group * 2 / 255).half().float()
            scale, t = scales[:, j // GROUP_SIZE], target[:, j]
            cost, wrong = torch.zeros(256, rows), torch.zeros(256, rows)
            for bits, lam in WIDTHS.items():
                value = slice_codes(candidates, bits, 8, "round") << (8 - bits)
                error = t - scale * (value - 128.0)
                wrong += error
                cost += lam * error**2
            codes[:, j] = cost.argmin(0)
            mean = wrong.gather(0, codes[None, :, j].long())[0] / len(WIDTHS)
            errors[:, j - first] = mean / factor[j, j]
            target[:, j + 1 : last] -= errors[:, j - first, None] * factor[j, j + 1 : last]
        target[:, last:] -= errors @ factor[first:last, last:]
    return NestedWeight(
        codes=codes,
        scales=scales,
        zeros=None,
        format=WeightFormat(master_bits=8, slicing="round", group_size=GROUP_SIZE, scale_dtype=scales.dtype),
    )


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] with some large columns, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    latent = torch.randn(2 * columns, columns // 4, generator=generator)
    inputs = latent @ torch.randn(columns // 4, columns, generator=generator) / (columns // 4) ** 0.5
    inputs += 0.5 * torch.randn(inputs.shape, generator=generator)
    inputs *= torch.exp(0.5 * torch.randn(columns, generator=generator))
    return weight, 2 * inputs.T @ inputs / len(inputs)


def least_seconds(run: Callable[[], NestedWeight], repeats: int) -> tuple[float, NestedWeight]:
    """The least of the repeats' times, and what they made."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = run()
        times.append(time.perf_counter() - start)
    return min(times), made


def bench(rows: int, columns: int, repeats: int) -> list[Row]:
    """All variants on one layer; calibration (factoring the Hessian) is common to all and not timed."""
    weight, hessian = layer(rows, columns)
    calibration = calibrate([Inputs(hessian=hessian)], OURS["(c) ours, scale search"])
    timed = columns if rows * columns <= LARGEST_BASELINE else max(GROUP_SIZE, LARGEST_BASELINE // 4 // rows)
    timed = timed // GROUP_SIZE * GROUP_SIZE
    baseline, made = least_seconds(lambda: published(weight, calibration.factors[0], timed), repeats)
    baseline *= columns / timed
    whole = errors_of(weight, made, hessian) if timed == columns else None
    found = [
        Row(rows=rows, columns=columns, what=BASELINE, seconds=baseline, faster=1.0, timed_columns=timed, errors=whole)
    ]
    for what, options in OURS.items():
        seconds, made = least_seconds(lambda o=options: solve(weight, calibration, o), repeats)
        errors = errors_of(weight, made, hessian)
        found.append(
            Row(
                rows=rows,
                columns=columns,
                what=what,
                seconds=seconds,
                faster=baseline / seconds,
                timed_columns=columns,
                errors=errors,
            )
        )
    return found


def errors_of(weight: Tensor, made: NestedWeight, hessian: Tensor) -> dict[int, float]:
    return {bits: relative_error(weight, made.dequantize(bits), hessian) for bits in WIDTHS}


def warm_up() -> None:
    """Compile, and start the threads."""
    weight, hessian = layer(8, 256)
    calibration: Calibration = calibrate([Inputs(hessian=hessian)], OURS["(c) ours, scale search"])
    for options in OURS.values():
        solve(weight, calibration, options)
    published(weight, calibration.factors[0], 256)


def print_rows(found: Sequence[Row]) -> None:
    for row in found:
        part = "" if row.timed_columns == row.columns else f"  (first {row.timed_columns} columns, scaled up)"
        errors = "  ".join(f"{e:9.2e}" for e in (row.errors or {}).values())
        name = f"{row.rows}x{row.columns}"
        print(f"{name:>11}  {row.what:<46}{row.seconds:8.2f} s {row.faster:7.1f}x  {errors}{part}", flush=True)


def machine() -> dict[str, str | int]:
    """On what the figures were measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024x1024,2048x2048", help="rows x columns, with commas between")
    parser.add_argument("--repeats", type=int, default=3, help="of our solver; the least time counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(min(arguments.threads, numba.config.NUMBA_NUM_THREADS))
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'layer':>11}  {'':<46}{'time':>10} {'vs (a)':>8}  relative error at {', '.join(map(str, WIDTHS))} bits")
    warm_up()
    found = []
    for size in arguments.sizes.split(","):
        rows, columns = map(int, size.split("x"))
        found += bench(rows, columns, arguments.repeats)
        print_rows(found[-len(OURS) - 1 :])
    print(NOTE)
    if arguments.out:
        report = {"machine": about, "rows": [dataclasses.asdict(row) for row in found]}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
