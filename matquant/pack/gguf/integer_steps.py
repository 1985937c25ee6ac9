"""Slices as whole multiples of a step, found from the dequantized values and not from the formula of a weight format.

A slice is exact in a GGUF type of whole numbers if all its values are d * n, with one d for each block of 32 columns and n in
the range of the type. Here d is the group's scale times a power of two that all groups of the layer share.
"""

import dataclasses
import operator
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from matquant.formats.groups import expand_groups
from matquant.formats.nested import NestedWeight

_UNITS = 2**8  # of a scale; no format has finer steps
_ELEMENTS_AT_ONCE = 2**22


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRange:
    """Whole numbers n of a layer whose values are scale * step * n.

    Attributes:
        step: power of two.
        low, high: smallest and largest n.
    """

    step: float
    low: int
    high: int

    def sign_for(self, middle: int) -> int:
        """Sign of the scales with which all n lie in -middle..middle - 1: 1 or -1, or 0 if there is none."""
        for sign in (1, -1):
            ends = sorted((sign * self.low, sign * self.high))
            if -middle <= ends[0] and ends[1] < middle:
                return sign
        return 0


def slice_steps(weight: NestedWeight, bits: int) -> StepRange | None:
    """Largest step of which all values of a slice are whole multiples; None if there is none."""
    common, low, high = 0, 0, 0
    for part in row_strips(weight):
        units = _units(part, bits)
        if units is None:
            return None
        common |= int(np.bitwise_or.reduce(units, axis=None))
        low, high = min(low, int(units.min())), max(high, int(units.max()))
    step = common & -common or 1  # lowest bit that is set
    return StepRange(step=step / _UNITS, low=low // step, high=high // step)


def step_scales(weight: NestedWeight, bits: int, step: float) -> Tensor | None:
    """Scales of a slice times ``step`` in float16, [out_features, groups]; None if one of them is not a float16 number."""
    wanted = weight.scales_at(bits).double() * step
    scales = wanted.half()
    return scales if torch.equal(scales.double(), wanted) else None


def step_numbers(weight: NestedWeight, bits: int, step: float) -> Tensor:
    """Whole numbers n of a slice with a known step: int32 [out_features, in_features]."""
    units = _units(weight, bits)
    assert units is not None  # slice_steps found the step
    return torch.from_numpy(units // int(step * _UNITS)).int()


def row_strips(weight: NestedWeight) -> Iterator[NestedWeight]:
    """A weight in strips of rows, to limit the memory of intermediate results."""
    rows, columns = weight.codes.shape
    size = max(1, _ELEMENTS_AT_ONCE // columns)
    for start in range(0, rows, size):
        yield weight.map_tensors(operator.itemgetter(slice(start, start + size)))


def _units(weight: NestedWeight, bits: int) -> np.ndarray | None:
    """Values of a slice over their scales, in parts of 1 / _UNITS: int64 [rows, columns]; None if they are not whole."""
    values = weight.dequantize(bits).double()
    scales = expand_groups(weight.scales_at(bits).double(), values.shape[1], weight.format.group_size)
    units = torch.where(scales == 0, 0, values / scales * _UNITS).round_()
    return units.long().numpy() if torch.equal(units * scales / _UNITS, values) else None
