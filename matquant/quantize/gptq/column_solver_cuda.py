"""Column solver as CUDA kernels of ``kernels/solver.cu``; ``column_solver_cpu`` describes the algorithm."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from matquant import cuda
from matquant.quantize.gptq.code_grid import CodeGrid, ScaleSearchSpace

SOURCE = "solver.cu"
# Fused multiply-adds would give other floats than the CPU.
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
    """Load a kernel of ``solver.cu`` on a CUDA device."""
    return cuda.load(SOURCE, function, defines=dict(defines), device=device, options=OPTIONS)


def choose_scales(
    targets: Tensor,
    first: int,
    last: int,
    hessian_diag: Tensor,
    lambdas: Tensor,
    grid: CodeGrid,
    search_space: ScaleSearchSpace,
    load: Load = load,
) -> tuple[Tensor, Tensor]:
    """Choose scales and zero points, see ``column_solver.choose_scales``."""
    count, rows, columns = targets.shape
    kernel = load("choose_scales", _defines(grid, lambdas, count, 1, search_space.dtype), targets.device)
    scales, zeros = targets.new_empty(2, rows).unbind()
    args = (
        targets,
        hessian_diag,
        lambdas,
        grid.cells,
        grid.codes,
        float(grid.centre),
        search_space.clip_ratios,
        len(search_space.clip_ratios),
        search_space.zero_points,
        len(search_space.zero_points),
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
    lambdas: Tensor,
    grid: CodeGrid,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    load: Load = load,
) -> Tensor:
    """Choose codes, see ``column_solver.solve_columns``."""
    count, rows, columns = targets.shape
    width = last - first
    kernel = load("solve_columns", _defines(grid, lambdas, count, len(factor), torch.float32), targets.device)
    errors = targets.new_empty(count, width, rows)
    args = (
        targets,
        factor,
        lambdas,
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


def descend_columns(
    gradient: Tensor,
    first: int,
    last: int,
    hessian: Tensor,
    lambdas: Tensor,
    grid: CodeGrid,
    scales: Tensor,
    codes: Tensor,
    load: Load = load,
) -> Tensor:
    """Run a pass of coordinate descent, see ``column_solver.descend_columns``."""
    count, rows, columns = gradient.shape
    width = last - first
    kernel = load("descend_columns", _defines(grid, lambdas, count, len(hessian), torch.float32), gradient.device)
    moves = gradient.new_empty(count, width, rows)
    args = (
        gradient,
        hessian,
        lambdas,
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


def max_block_size(bit_widths: int) -> int:
    """Columns whose tile fits the shared memory of a block on the GPUs with the least of it."""
    columns = 128
    while _tile_bytes(bit_widths, columns) > _SHARED_BYTES:
        columns //= 2
    return columns


def _defines(grid: CodeGrid, lambdas: Tensor, targets: int, factors: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "WIDTHS": len(lambdas),
        "TARGETS": targets,
        "FACTORS": factors,
        "NESTED": int(grid.nested),
        "LOW": grid.low_cells.shape[1],
        "STRETCH": int(4 * grid.stretch),
        "SCALES": _SCALES[dtype],
    }


def _blocks(rows: int, each: int) -> int:
    return (rows + each - 1) // each


def _tile_bytes(count: int, width: int) -> int:
    return count * width * (_LANES + 1) * 4
