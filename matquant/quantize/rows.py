"""The row solver, on the device where the weights are: compiled for the CPU in ``rows_cpu``, which also says how it works,
and as CUDA kernels in ``rows_cuda``.

K is the number of widths in the objective, ascending, each with a weight above zero; T the number of compensated targets,
K or 1 when all widths share one; F the number of Hessians, K or 1.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from matquant.nested import Slicing
from matquant.quantize import rows_cpu

# Stands for a zero point that follows from a group's smallest and largest weight.
FROM_RANGE = float(rows_cpu.FROM_RANGE)

# Mantissa bits and smallest normal exponent of the dtypes in which scales are stored.
_SCALE_FORMATS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The cells of the objective's widths.

    Attributes:
        cells: float32 [3, K]; of each width the codes in one cell, the cells in one of the width before, and its cells.
        codes: 2^M.
        centre: of a cell in cells, 1/2 for msb slices and 0 for round ones.
        nested: whether the cells of a width hold whole cells of the next.
    """

    cells: np.ndarray
    codes: int
    centre: np.float32
    nested: bool

    @classmethod
    def of(cls, widths: Sequence[int], master_bits: int, slicing: Slicing) -> "Grid":
        steps = [2.0 ** (master_bits - b) for b in widths]
        ratios = [1.0, *(above / below for above, below in itertools.pairwise(steps))]
        cells = np.array([steps, ratios, [2.0**b for b in widths]], dtype=np.float32)
        nested = slicing == "msb" or list(widths) == [master_bits]
        return cls(cells, 2**master_bits, np.float32(0.5 if slicing == "msb" else 0), nested)


@dataclasses.dataclass(frozen=True, slots=True)
class Trials:
    """The scales that are tried for a group.

    Attributes:
        clips: float32, shares of the group's range that the grid covers.
        zero_points: float32, each tried with the clips; ``FROM_RANGE`` among them where there is a zero point per group.
        dtype: in which scales are stored; what is tried is rounded to it.
    """

    clips: np.ndarray
    zero_points: np.ndarray
    dtype: torch.dtype


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
    scales, zeros = targets.new_empty(2, targets.shape[1]).unbind()
    rows_cpu.choose_scales(
        targets.numpy(), first, last, importance.numpy(), lam.numpy(), grid.cells, grid.codes, grid.centre, grid.nested,
        trials.clips, trials.zero_points, *_SCALE_FORMATS[trials.dtype], scales.numpy(), zeros.numpy(),
    )  # fmt: skip
    return scales, zeros


def solve_columns(
    targets: Tensor, first: int, last: int, factor: Tensor, lam: Tensor, grid: Grid, scales: Tensor, zeros: Tensor,
    codes: Tensor,
) -> Tensor:  # fmt: skip
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
    errors = targets.new_empty(len(targets), targets.shape[1], last - first)
    rows_cpu.solve_columns(
        targets.numpy(), factor.numpy(), lam.numpy(), grid.cells, grid.codes, grid.centre, grid.nested, first, last,
        scales.numpy(), zeros.numpy(), codes.numpy(), errors.numpy(),
    )  # fmt: skip
    return errors


def sweep_columns(
    gradient: Tensor, first: int, last: int, hessian: Tensor, lam: Tensor, grid: Grid, scales: Tensor, zeros: Tensor,
    codes: Tensor,
) -> Tensor:  # fmt: skip
    """One pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Args:
        gradient: float32 [K, rows, columns], half the gradient.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
        lam, scales, zeros, codes: as in ``solve_columns``.

    Returns:
        float32 [K, rows, last - first]: the change of each width's value.
    """
    moves = gradient.new_empty(len(gradient), gradient.shape[1], last - first)
    rows_cpu.sweep_columns(
        gradient.numpy(), hessian.numpy(), lam.numpy(), grid.cells, grid.codes, grid.centre, grid.nested, first, last,
        scales.numpy(), zeros.numpy(), codes.numpy(), moves.numpy(),
    )  # fmt: skip
    return moves
