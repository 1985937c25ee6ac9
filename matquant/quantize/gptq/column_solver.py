"""The row solver, on the device where the weights are: compiled for the CPU in ``rows_cpu``, which also says how it works,
and as CUDA kernels in ``rows_cuda``.

K is the number of widths in the objective, ascending, each with a weight above zero; T the number of compensated targets,
K or 1 when all widths share one; F the number of Hessians, K or 1.
"""

import numpy as np
import torch
from torch import Tensor

from matquant.quantize.gptq import column_solver_cpu, column_solver_cuda
from matquant.quantize.gptq.code_grid import Grid, Trials

# Mantissa bits and smallest normal exponent of the dtypes in which scales are stored.
_SCALE_FORMATS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}


def choose_scales(
    targets: Tensor, first: int, last: int, importance: Tensor, lam: Tensor, grid: Grid, trials: Trials
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row for the group of columns first..last: the pair of least nested rounding error.

    Args:
        targets: float32 [T, rows, columns], with all feedback so far.
        importance: float32 [columns], weight of the squared errors in a column.
        lam: float32 [K, columns], weight of each width in a column.

    Returns:
        float32 [rows] each; with a single clip and zero point they are plain min-max.
    """
    if targets.is_cuda:
        return column_solver_cuda.choose_scales(targets, first, last, importance, lam, grid, trials)
    scales, zeros = targets.new_empty(2, targets.shape[1]).unbind()
    column_solver_cpu.choose_scales(
        targets.numpy(),
        first,
        last,
        importance.numpy(),
        lam.numpy(),
        *_cells(grid),
        trials.clips.numpy(),
        trials.zero_points.numpy(),
        *_SCALE_FORMATS[trials.dtype],
        scales.numpy(),
        zeros.numpy(),
    )
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
) -> Tensor:
    """Choose the codes of the columns first..last of every row, feeding each column's error into the later of them.

    Args:
        targets: float32 [T, rows, columns].
        factor: float32 [F, last - first, last - first], the block of each inverse Hessian's upper Cholesky factor.
        lam: float32 [K, columns].
        scales, zeros: float32 [rows], of the one group in which these columns lie.
        codes: uint8 [rows, columns], updated in place.

    Returns:
        float32 [T, rows, last - first]: each target's error over the factor's diagonal.
    """
    if targets.is_cuda:
        return column_solver_cuda.solve_columns(targets, first, last, factor, lam, grid, scales, zeros, codes)
    errors = targets.new_empty(len(targets), targets.shape[1], last - first)
    column_solver_cpu.solve_columns(
        targets.numpy(),
        factor.numpy(),
        lam.numpy(),
        *_cells(grid),
        first,
        last,
        scales.numpy(),
        zeros.numpy(),
        codes.numpy(),
        errors.numpy(),
    )
    return errors


def sweep_columns(
    gradient: Tensor, first: int, last: int, hessian: Tensor, lam: Tensor, grid: Grid, scales: Tensor, codes: Tensor
) -> Tensor:
    """One pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Args:
        gradient: float32 [K, rows, columns], half the gradient.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
        lam, scales, codes: as in ``solve_columns``.

    Returns:
        float32 [K, rows, last - first]: the change of each width's value.
    """
    if gradient.is_cuda:
        return column_solver_cuda.sweep_columns(gradient, first, last, hessian, lam, grid, scales, codes)
    moves = gradient.new_empty(len(gradient), gradient.shape[1], last - first)
    column_solver_cpu.sweep_columns(
        gradient.numpy(),
        hessian.numpy(),
        lam.numpy(),
        *_cells(grid),
        first,
        last,
        scales.numpy(),
        codes.numpy(),
        moves.numpy(),
    )
    return moves


def largest_block(device: torch.device, widths: int) -> int:
    """How many columns ``solve_columns`` and ``sweep_columns`` take at most at once."""
    return column_solver_cuda.largest_block(widths) if device.type == "cuda" else 1024


def _cells(grid: Grid) -> tuple[np.ndarray, int, np.float32, bool]:
    return grid.cells.numpy(), grid.codes, np.float32(grid.centre), grid.nested
