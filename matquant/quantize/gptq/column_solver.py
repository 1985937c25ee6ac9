"""Column solver on the device of the weights: ``column_solver_cpu`` (which describes the algorithm) or ``column_solver_cuda``.

K is the number of bit-widths in the objective, ascending, each with a weight above zero; T the number of compensated targets,
K, or 1 when all bit-widths share one; F the number of Hessians, K or 1.
"""

import numpy as np
import torch
from torch import Tensor

from matquant.quantize.gptq import column_solver_cpu, column_solver_cuda
from matquant.quantize.gptq.code_grid import CodeGrid, ScaleSearchSpace

# Mantissa bits and smallest normal exponent of the dtypes in which scales are stored.
_SCALE_FORMATS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}


def choose_scales(
    targets: Tensor,
    first: int,
    last: int,
    hessian_diag: Tensor,
    lambdas: Tensor,
    grid: CodeGrid,
    search_space: ScaleSearchSpace,
) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of every row for the group of columns first..last, by the least nested rounding error.

    Args:
        targets: float32 [T, rows, columns], error-compensated so far.
        hessian_diag: float32 [columns], weight of the squared errors in a column.
        lambdas: float32 [K, columns], weight of each bit-width in a column.

    Returns:
        float32 [rows] each; plain min-max with a single clip ratio and zero point.
    """
    if targets.is_cuda:
        return column_solver_cuda.choose_scales(targets, first, last, hessian_diag, lambdas, grid, search_space)
    scales, zeros = targets.new_empty(2, targets.shape[1]).unbind()
    column_solver_cpu.choose_scales(
        targets.numpy(),
        first,
        last,
        hessian_diag.numpy(),
        lambdas.numpy(),
        compiled_grid(grid),
        search_space.clip_ratios.numpy(),
        search_space.zero_points.numpy(),
        *_SCALE_FORMATS[search_space.dtype],
        scales.numpy(),
        zeros.numpy(),
    )
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
) -> Tensor:
    """Choose the codes of the columns first..last of every row, and feed each column's error into the later ones.

    Args:
        targets: float32 [T, rows, columns].
        factor: float32 [F, last - first, last - first], the block of each inverse Hessian's upper Cholesky factor.
        lambdas: float32 [K, columns].
        scales: float32 [K, rows], of the one group in which these columns lie.
        zeros: float32 [rows], of that group.
        codes: uint8 [rows, columns], updated in place.

    Returns:
        float32 [T, rows, last - first]: each target's error over the factor's diagonal.
    """
    if targets.is_cuda:
        return column_solver_cuda.solve_columns(targets, first, last, factor, lambdas, grid, scales, zeros, codes)
    errors = targets.new_empty(len(targets), targets.shape[1], last - first)
    column_solver_cpu.solve_columns(
        targets.numpy(),
        factor.numpy(),
        lambdas.numpy(),
        compiled_grid(grid),
        first,
        last,
        scales.numpy(),
        zeros.numpy(),
        codes.numpy(),
        errors.numpy(),
    )
    return errors


def descend_columns(
    gradient: Tensor,
    first: int,
    last: int,
    hessian: Tensor,
    lambdas: Tensor,
    grid: CodeGrid,
    scales: Tensor,
    codes: Tensor,
) -> Tensor:
    """Run one pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Args:
        gradient: float32 [K, rows, columns], half the gradient.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
        lambdas, scales, codes: as in ``solve_columns``.

    Returns:
        float32 [K, rows, last - first]: the change of the value at each bit-width.
    """
    if gradient.is_cuda:
        return column_solver_cuda.descend_columns(gradient, first, last, hessian, lambdas, grid, scales, codes)
    moves = gradient.new_empty(len(gradient), gradient.shape[1], last - first)
    column_solver_cpu.descend_columns(
        gradient.numpy(),
        hessian.numpy(),
        lambdas.numpy(),
        compiled_grid(grid),
        first,
        last,
        scales.numpy(),
        codes.numpy(),
        moves.numpy(),
    )
    return moves


def max_block_size(device: torch.device, bit_widths: int) -> int:
    """Largest number of columns that ``solve_columns`` and ``descend_columns`` process at once."""
    return column_solver_cuda.max_block_size(bit_widths) if device.type == "cuda" else 1024


def compiled_grid(grid: CodeGrid) -> column_solver_cpu.SolverGrid:
    """Grid as ``column_solver_cpu`` takes it."""
    return column_solver_cpu.SolverGrid(
        cells=grid.cells.numpy(),
        low_cells=grid.low_cells.numpy(),
        codes=grid.codes,
        centre=np.float32(grid.centre),
        nested=grid.nested,
        stretch=np.float32(grid.stretch),
    )
