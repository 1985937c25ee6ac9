"""Time the nested solver on a CPU, against the algorithm of MatGPTQ v1 (arXiv 2602.03537) as a column loop in torch.

    make bench-solver                                   # 1024x1024 and 2048x2048
    .venv/bin/python experiments/benchmarks/bench_solver.py --sizes 4096x4096,4096x14336 --out bench.json

A size is the rows x columns of one layer: random weights, correlated inputs, five bit-widths, group size 128, two threads. The
baseline of a large layer runs on the first columns only; its time is extrapolated to all columns.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight, WeightFormat, slice_codes
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve
from matquant.report.provenance import provenance

LAMBDAS = {2: 1.0, 3: 2.0, 4: 4.0, 6: 16.0, 8: 64.0}
GROUP_SIZE = 128
BLOCK_SIZE = 128  # columns between two lazy updates
MAX_BASELINE_WEIGHTS = 2048 * 2048  # of larger layers the baseline solves only the first columns
NOTE = "Large layers: --sizes 4096x4096,4096x14336 (rows x columns; the last needs minutes and gigabytes)."

BASELINE = "(a) MatGPTQ v1, its column loop in torch"
MINMAX = SolverOptions(lambdas=LAMBDAS, group_size=GROUP_SIZE, scale="minmax")
SEARCHED = SolverOptions(lambdas=LAMBDAS, group_size=GROUP_SIZE)
OURS = {
    "(b) ours, min-max scales": MINMAX,
    "(c) ours, scale search": SEARCHED,
    "(d) ours, scale search, 1 pass": dataclasses.replace(SEARCHED, cd_passes=1),
    "(e) ours, default: mirrored grids, 2 passes": dataclasses.replace(SEARCHED, cd_passes=2, zero_point_offset=8.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        solver: label.
        seconds: minimum of all repeats; extrapolated if ``timed_columns`` is less than ``columns``.
        speedup: over the baseline.
        timed_columns: columns that were solved.
        errors: relative output error by bit-width; None if not all columns were solved.
    """

    rows: int
    columns: int
    solver: str
    seconds: float
    speedup: float
    timed_columns: int
    errors: dict[int, float] | None


def solve_matgptq_v1(weight: Tensor, factor: Tensor, columns: int) -> NestedWeight:
    """Solve the first ``columns`` columns by the algorithm of MatGPTQ v1, with the work per column of its code.

    All 256 candidates of every row are sliced, dequantized and compared at every bit-width. The plain mean of the errors of all
    bit-widths is fed back into one shared target.

    Args:
        weight: float32 [rows, all columns].
        factor: float32 [all columns, all columns], upper Cholesky factor of the inverse Hessian.
    """
    target, rows = weight.clone(), len(weight)
    candidates = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, rows)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(rows, columns // GROUP_SIZE)
    for first in range(0, columns, BLOCK_SIZE):
        last = min(first + BLOCK_SIZE, columns)
        errors = torch.zeros(rows, last - first)
        for j in range(first, last):
            if j % GROUP_SIZE == 0:
                group = target[:, j : j + GROUP_SIZE].abs().amax(1)
                scales[:, j // GROUP_SIZE] = (group * 2 / 255).half().float()
            scale, t = scales[:, j // GROUP_SIZE], target[:, j]
            cost, error_sum = torch.zeros(256, rows), torch.zeros(256, rows)
            for bits, lam in LAMBDAS.items():
                value = slice_codes(candidates, bits, 8, "round") << (8 - bits)
                error = t - scale * (value - 128.0)
                error_sum += error
                cost += lam * error**2
            codes[:, j] = cost.argmin(0)
            mean = error_sum.gather(0, codes[None, :, j].long())[0] / len(LAMBDAS)
            errors[:, j - first] = mean / factor[j, j]
            target[:, j + 1 : last] -= errors[:, j - first, None] * factor[j, j + 1 : last]
        target[:, last:] -= errors @ factor[first:last, last:]
    return NestedWeight(
        codes=codes,
        scales=scales,
        zeros=None,
        format=WeightFormat(master_bits=8, slicing="round", group_size=GROUP_SIZE, scale_dtype=scales.dtype),
    )


def make_layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight [rows, columns] and Hessian [columns, columns] of correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    latent = torch.randn(2 * columns, columns // 4, generator=generator)
    inputs = latent @ torch.randn(columns // 4, columns, generator=generator) / (columns // 4) ** 0.5
    inputs += 0.5 * torch.randn(inputs.shape, generator=generator)
    inputs *= torch.exp(0.5 * torch.randn(columns, generator=generator))
    return weight, 2 * inputs.T @ inputs / len(inputs)


def min_seconds(call: Callable[[], NestedWeight], repeats: int) -> tuple[float, NestedWeight]:
    """Minimum time of the repeats, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        quantized = call()
        times.append(time.perf_counter() - start)
    return min(times), quantized


def bench(rows: int, columns: int, repeats: int) -> list[Row]:
    """Time all solvers on one layer. The factorization of the Hessian is common to all and is not timed."""
    weight, hessian = make_layer(rows, columns)
    prepared = prepare_hessians([HessianStats(hessian=hessian)], SEARCHED)
    timed = columns if rows * columns <= MAX_BASELINE_WEIGHTS else max(GROUP_SIZE, MAX_BASELINE_WEIGHTS // 4 // rows)
    timed = timed // GROUP_SIZE * GROUP_SIZE
    baseline, quantized = min_seconds(lambda: solve_matgptq_v1(weight, prepared.factors[0], timed), repeats)
    baseline *= columns / timed
    errors = relative_errors(weight, quantized, hessian) if timed == columns else None
    size = {"rows": rows, "columns": columns}
    found = [Row(**size, solver=BASELINE, seconds=baseline, speedup=1.0, timed_columns=timed, errors=errors)]
    for solver, options in OURS.items():
        seconds, quantized = min_seconds(lambda o=options: solve(weight, prepared, o), repeats)
        errors, speedup = relative_errors(weight, quantized, hessian), baseline / seconds
        found.append(Row(**size, solver=solver, seconds=seconds, speedup=speedup, timed_columns=columns, errors=errors))
    return found


def relative_errors(weight: Tensor, quantized: NestedWeight, hessian: Tensor) -> dict[int, float]:
    """Relative output error at each bit-width."""
    return {bits: relative_error(weight, quantized.dequantize(bits), hessian) for bits in LAMBDAS}


def warm_up() -> None:
    """Compile the solvers and start their threads."""
    weight, hessian = make_layer(8, 256)
    prepared = prepare_hessians([HessianStats(hessian=hessian)], SEARCHED)
    for options in OURS.values():
        solve(weight, prepared, options)
    solve_matgptq_v1(weight, prepared.factors[0], 256)


def print_rows(found: Sequence[Row]) -> None:
    """Print the lines of one layer."""
    for row in found:
        part = "" if row.timed_columns == row.columns else f"  (first {row.timed_columns} columns, extrapolated)"
        errors = "  ".join(f"{e:9.2e}" for e in (row.errors or {}).values())
        size = f"{row.rows}x{row.columns}"
        print(f"{size:>11}  {row.solver:<46}{row.seconds:8.2f} s {row.speedup:7.1f}x  {errors}{part}", flush=True)


def main() -> None:
    """Time the layers of the command line, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024x1024,2048x2048", help="rows x columns, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each solver; the minimum time is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(min(arguments.threads, numba.config.NUMBA_NUM_THREADS))
    print(f"{'layer':>11}  {'':<46}{'time':>10} {'vs (a)':>8}  relative error at {', '.join(map(str, LAMBDAS))} bits")
    warm_up()
    found = []
    for size in arguments.sizes.split(","):
        rows, columns = map(int, size.split("x"))
        found += bench(rows, columns, arguments.repeats)
        print_rows(found[-len(OURS) - 1 :])
    print(NOTE)
    if arguments.out:
        record = {
            "provenance": provenance(),
            "threads": arguments.threads,
            "rows": [dataclasses.asdict(row) for row in found],
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
