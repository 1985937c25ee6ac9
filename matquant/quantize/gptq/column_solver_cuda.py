"""The row solver as CUDA kernels, from ``kernels/solver.cu``; what it does is said in ``rows_cpu``."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from matquant import cuda
from matquant.quantize.gptq.code_grid import Grid, Trials

SOURCE = "solver.cu"
# Contracting a product and a sum into one rounding would make other floats than the CPU's.
OPTIONS = ("-fmad=false",)

_LANES = 32
_WARPS = 4  # rows of a block in the scale search
_SHARED_BYTES = 99 * 1024  # of a block on sm_86 and sm_89
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Launchable(Protocol):
    """A compiled kernel."""

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, shared_bytes: int = 0) -> None: ...


Load = Callable[[str, Mapping[str, int], torch.device], Launchable]


def load(function: str, defines: Mapping[str, int], device: torch.device) -> Launchable:
    """A kernel of ``solver.cu`` for a CUDA device."""
    return cuda.load(SOURCE, function, defines=dict(defines), device=device, options=OPTIONS)


def choose_scales(
    targets: Tensor,
    first: int,
    last: int,
    importance: Tensor,
    lam: Tensor,
    grid: Grid,
    trials: Trials,
    load: Load = load,
) -> tuple[Tensor, Tensor]:
    """As ``rows.choose_scales``."""
    count, rows, columns = targets.shape
    kernel = load("choose_scales", _defines(grid, lam, count, 1, trials.dtype), targets.device)
    scales, zeros = targets.new_empty(2, rows).unbind()
    args = (
        targets,
        importance,
        lam,
        grid.cells,
        grid.codes,
        float(grid.centre),
        trials.clips,
        len(trials.clips),
        trials.zero_points,
        len(trials.zero_points),
        rows,
        columns,
        first,
        last,
        scales,
        zeros,
    )
    kernel.launch((_blocks(rows, _WARPS),), (_WARPS * _LANES,), args)
    return scales, zeros


def solve_columns(
    targets: Tensor,
    first: int,
    last: int,
    factor: Tensor,
    lam: Tensor,
    grid: Grid,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    load: Load = load,
) -> Tensor:
    """As ``rows.solve_columns``."""
    count, rows, columns = targets.shape
    width = last - first
    kernel = load("solve_columns", _defines(grid, lam, count, len(factor), torch.float32), targets.device)
    errors = targets.new_empty(count, width, rows)
    args = (
        targets,
        factor,
        lam,
        grid.cells,
        grid.codes,
        float(grid.centre),
        rows,
        columns,
        first,
        width,
        scales,
        zeros,
        codes,
        errors,
    )
    kernel.launch((_blocks(rows, _LANES),), (_LANES,), args, shared_bytes=_tile_bytes(count, width))
    return errors.transpose(1, 2)


def sweep_columns(
    gradient: Tensor,
    first: int,
    last: int,
    hessian: Tensor,
    lam: Tensor,
    grid: Grid,
    scales: Tensor,
    codes: Tensor,
    load: Load = load,
) -> Tensor:
    """As ``rows.sweep_columns``."""
    count, rows, columns = gradient.shape
    width = last - first
    kernel = load("sweep_columns", _defines(grid, lam, count, len(hessian), torch.float32), gradient.device)
    moves = gradient.new_empty(count, width, rows)
    args = (
        gradient,
        hessian,
        lam,
        grid.cells,
        grid.codes,
        float(grid.centre),
        rows,
        columns,
        first,
        width,
        scales,
        codes,
        moves,
    )
    kernel.launch((_blocks(rows, _LANES),), (_LANES,), args, shared_bytes=_tile_bytes(count, width))
    return moves.transpose(1, 2)


def largest_block(widths: int) -> int:
    """Columns whose tile fits the shared memory of a block, on the GPUs that have least."""
    columns = 128
    while _tile_bytes(widths, columns) > _SHARED_BYTES:
        columns //= 2
    return columns


def _defines(grid: Grid, lam: Tensor, targets: int, factors: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "WIDTHS": len(lam),
        "TARGETS": targets,
        "FACTORS": factors,
        "NESTED": int(grid.nested),
        "SCALES": _SCALES[dtype],
    }


def _blocks(rows: int, each: int) -> int:
    return (rows + each - 1) // each


def _tile_bytes(count: int, width: int) -> int:
    return count * width * (_LANES + 1) * 4
