"""Shard of a packed weight: the rows and columns that one of several devices holds.

A shard that is aligned to tiles copies tiles. Any other shard unpacks one plane at a time, slices it and packs it again. If its
columns start within a group, the shard uses smaller groups and repeats their scale, so that each lies in one group of the whole
weight.
"""

import dataclasses
import math

import torch
from torch import Tensor

from matquant.formats.groups import group_count, group_index
from matquant.formats.tile_layout import (
    TILE,
    pack_groups,
    pack_planes,
    rotate_plane_bits,
    stored_group_count,
    tiles,
    unpack_groups,
    unpack_planes,
)


@dataclasses.dataclass(frozen=True, slots=True)
class WeightShard:
    """Rows and columns of a weight [out_features, in_features] that one device holds.

    Attributes:
        out_features, in_features: size of the whole weight.
        rows: ranges (start, stop) of rows, held one after the other. Rows beyond the weight are held as zeros.
        columns: range (start, stop) of columns.

    Raises:
        ValueError: a range is empty or outside of the weight.
    """

    out_features: int
    in_features: int
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]

    def __post_init__(self) -> None:
        start, stop = self.columns
        if not 0 <= start < stop <= self.in_features or any(not 0 <= a <= b for a, b in self.rows):
            raise ValueError(f"no shard of [{self.out_features}, {self.in_features}]: {self.rows}, {self.columns}")

    @classmethod
    def whole(cls, out_features: int, in_features: int) -> "WeightShard":
        """Shard that holds the whole weight."""
        return cls(out_features, in_features, ((0, out_features),), (0, in_features))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the shard."""
        return sum(stop - start for start, stop in self.rows), self.columns[1] - self.columns[0]

    @property
    def is_tile_aligned(self) -> bool:
        """True if the shard consists of whole tiles, where the last ones may end with the weight."""
        edges = [(start, stop, self.out_features) for start, stop in self.rows]
        edges.append((*self.columns, self.in_features))
        rows_fit = all((stop - start) % TILE == 0 for start, stop in self.rows[:-1])
        return rows_fit and all(
            start % TILE == 0 and stop <= end and (stop % TILE == 0 or stop == end) for start, stop, end in edges
        )

    def group_size(self, group_size: int) -> int:
        """Group size of the shard: that of the whole weight, or a divisor so that no group of the shard crosses two of them."""
        start, stop = self.columns
        width, to_next_group = stop - start, -start % group_size
        return width if to_next_group >= width else min(math.gcd(group_size, to_next_group), width)

    def slice_matrix(self, matrix: Tensor) -> Tensor:
        """Slice a matrix [out_features, in_features], for example of codes: [rows, columns] of the shard."""
        return _slice_rows(matrix[:, slice(*self.columns)], self.rows, self.out_features)

    def slice_plane(self, plane: Tensor, index: int) -> Tensor:
        """Slice one packed plane.

        Args:
            plane: int32 [row tiles, column tiles, 32, 4] of the whole weight, as in ``formats.tile_layout``.
            index: number of the plane, 0 for the most significant.

        Returns:
            int32 [row tiles, column tiles, 32, 4] of the shard.
        """
        if self.is_tile_aligned:
            side = plane[:, self.columns[0] // TILE : tiles(self.columns[1])]
            return torch.cat([side[start // TILE : tiles(stop)] for start, stop in self.rows])
        unpacked = unpack_planes(rotate_plane_bits(plane, index)[None])[: self.out_features, : self.in_features]
        rows, columns = self.shape
        padded = unpacked.new_zeros(tiles(rows) * TILE, tiles(columns) * TILE)
        padded[:rows, :columns] = self.slice_matrix(unpacked)
        return rotate_plane_bits(pack_planes(padded, 1)[0], -index)

    def slice_packed_groups(self, packed: Tensor, group_size: int) -> Tensor:
        """Slice packed scales or zero points [groups, row tiles, 8, 4, 2] of the whole weight, in the same layout."""
        values = unpack_groups(packed)[: self.out_features, : group_count(self.in_features, group_size)]
        return self.slice_groups(values, group_size)

    def slice_groups(self, values: Tensor, group_size: int) -> Tensor:
        """Slice scales or zero points [out_features, groups] of the whole weight and pack them for the shard."""
        own = self.group_size(group_size)
        groups = group_index(self.in_features, group_size, values.device)
        held = groups[slice(*self.columns, own)]  # group of the first column of each group of the shard
        sliced = _slice_rows(values[:, held], self.rows, self.out_features)
        return pack_groups(sliced, stored_group_count(self.shape[1], own))


def _slice_rows(values: Tensor, rows: tuple[tuple[int, int], ...], count: int) -> Tensor:
    """Concatenate ranges of rows; rows from ``count`` on are zeros."""
    slices = []
    for start, stop in rows:
        slices.append(values[start : min(stop, count)])
        beyond = stop - max(start, count)
        if beyond > 0:
            slices.append(values.new_zeros(beyond, values.shape[1]))
    return torch.cat(slices)
