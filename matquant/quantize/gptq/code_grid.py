"""What the row solver's choices are made among: the cells of the widths, and the scales that are tried."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from matquant.formats.nested import Slicing

# Stands for a zero point that follows from a group's smallest and largest weight.
FROM_RANGE = math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The cells of the objective's widths.

    Attributes:
        cells: float32 [3, K]; of each width the codes in one cell, the cells in one of the width before, and its cells.
        codes: 2^M.
        centre: of a cell in cells, 1/2 for msb slices and 0 for round ones.
        nested: whether the cells of a width hold whole cells of the next.
    """

    cells: Tensor
    codes: int
    centre: float
    nested: bool

    @classmethod
    def of(
        cls, widths: Sequence[int], master_bits: int, slicing: Slicing, device: torch.device | str = "cpu"
    ) -> "Grid":
        steps = [2.0 ** (master_bits - b) for b in widths]
        ratios = [1.0, *(above / below for above, below in itertools.pairwise(steps))]
        cells = torch.tensor([steps, ratios, [2.0**b for b in widths]], device=device)
        nested = slicing == "msb" or list(widths) == [master_bits]
        return cls(cells, 2**master_bits, 0.5 if slicing == "msb" else 0.0, nested)


@dataclasses.dataclass(frozen=True, slots=True)
class Trials:
    """The scales that are tried for a group.

    Attributes:
        clips: float32, shares of the group's range that the grid covers, falling.
        zero_points: float32, each tried with the clips; ``FROM_RANGE`` among them where there is a zero point per group.
        dtype: in which scales are stored; what is tried is rounded to it.
    """

    clips: Tensor
    zero_points: Tensor
    dtype: torch.dtype
