"""Layers that share an input, stored as ranges of row tiles of one weight: one launch for neighbours of equal bit-width."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from matquant.formats.nested import WeightFormat
from matquant.formats.planes import read_scales
from matquant.formats.tile_layout import TILE, tiles
from matquant.inference import ops


def tile_ranges(rows: Sequence[int]) -> list[slice]:
    """Row tiles of each layer in the common weight; a layer starts with a tile of its own."""
    ends = list(itertools.accumulate(map(tiles, rows)))
    return [slice(end - tiles(count), end) for end, count in zip(ends, rows, strict=True)]


def empty_whole(parts: Sequence[Tensor]) -> Tensor:
    """Uninitialized tensor for the row tiles of all parts; their second dimension counts row tiles."""
    first, _, *rest = parts[0].shape
    return parts[0].new_empty(first, sum(part.shape[1] for part in parts), *rest)


@functools.lru_cache(maxsize=4096)
def equal_runs(bits: tuple[int, ...], rows: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Bit-width and rows of each layer of each run of neighbours of equal bit-width."""
    pairs = itertools.groupby(zip(bits, rows, strict=True), lambda one: one[0])
    return tuple((common, tuple(count for _, count in run)) for common, run in pairs)


def multiply_ranges(
    x: Tensor,
    planes: Tensor,
    scales: Sequence[Tensor],
    scale_bits: Sequence[int],
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: Sequence[int],
    rows: Sequence[int],
    in_features: int,
    *op_args: Any,
) -> list[Tensor]:
    """Products of x with layers that are ranges of row tiles of one weight. No gradients.

    Args:
        x: [..., in_features].
        planes, zeros: of the common weight, as in ``NestedPlanes``.
        scales: its base set of scales, then one set for each of ``scale_bits``.
        bias: [rows of all layers].
        bits: bit-width of each layer.
        rows: rows of each layer; a multiple of 64 for each but the last.
        op_args: see ``WeightFormat.op_args``.

    Returns:
        One tensor [..., rows] for each of ``equal_runs``, by one launch each.
    """
    outputs, first, total = [], 0, sum(rows)
    for own_bits, run in equal_runs(tuple(bits), tuple(rows)):
        count = sum(run)
        own_scales = read_scales(scales, scale_bits, own_bits)
        weight = (planes, own_scales, zeros)
        if count < total:
            part = slice(first // TILE, tiles(first + count))
            # The other planes may be in host memory.
            read = WeightFormat.from_op_args(own_scales, zeros, *op_args).planes_read(own_bits)
            weight = (planes[:read, part], own_scales[:, part], None if zeros is None else zeros[:, part])
        own_bias = None if bias is None else bias[first : first + count]
        outputs.append(ops.nested_linear(x, *weight, own_bias, own_bits, count, in_features, *op_args))
        first += count
    return outputs
