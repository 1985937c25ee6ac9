"""Candidate codes and scales of the column solver."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from matquant.formats.bits import STRICT_BITS
from matquant.formats.nested import Slicing

# Marks a zero point that follows from the smallest and largest weight of a group.
FROM_RANGE = math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class CodeGrid:
    """Cells of the objective's bit-widths, each a range of codes with the same value.

    Attributes:
        cells: float32 [4, K]; per bit-width the codes in one cell, its cells in one cell of the bit-width before, its cells,
            and ``centre``.
        codes: 2^M.
        centre: offset of a cell's value from its start, in cells: 1/2 for msb slices, 0 for round ones.
        nested: True if a cell of a bit-width holds whole cells of the next.
        low_cells: float32 [4, L]; ``cells`` of the bit-widths whose values the stretch changes, within one cell of four bits
            and relative to its centre, with the stretched length of a cell in place of its codes.
        stretch: of later planes, see ``formats.nested``; 1 if it changes the values of none of the bit-widths.
    """

    cells: Tensor
    codes: int
    centre: float
    nested: bool
    low_cells: Tensor
    stretch: float

    @classmethod
    def of(
        cls,
        bits: Sequence[int],
        master_bits: int,
        slicing: Slicing,
        stretch: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> "CodeGrid":
        """Grid of the objective's bit-widths, ascending."""
        steps = [2.0 ** (master_bits - b) for b in bits]
        ratios = [1.0, *(above / below for above, below in itertools.pairwise(steps))]
        centre = 0.5 if slicing == "msb" else 0.0
        cells = torch.tensor([steps, ratios, [2.0**b for b in bits], [centre] * len(bits)], device=device)
        nested = slicing == "msb" or list(bits) == [master_bits]
        stretched = sum(b > STRICT_BITS for b in bits) if stretch != 1 else 0
        low_cells = cells[:, len(bits) - stretched :].clone()
        low_cells[0] *= stretch
        low_cells[2] /= 2**STRICT_BITS
        low_cells[3] -= low_cells[2] / 2
        return cls(cells, 2**master_bits, centre, nested, low_cells, stretch if stretched else 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class ScaleSearchSpace:
    """Scales that are tried for a group.

    Attributes:
        clip_ratios: float32, shares of the group's range that the grid covers, falling.
        zero_points: float32, each tried with all clip ratios; ``FROM_RANGE`` is one of them where each group has a zero point.
        dtype: dtype of stored scales; candidates are rounded to it.
    """

    clip_ratios: Tensor
    zero_points: Tensor
    dtype: torch.dtype
