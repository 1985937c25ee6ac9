"""Parts of a packed weight: the rows and columns that one of several devices holds.

A cut between tiles copies tiles. Any other cut unpacks one plane at a time, cuts, and packs again. Groups that a cut of columns
would divide become smaller ones, with their scale repeated, so that every group of the part lies in one group of the whole.
"""

import dataclasses
import math

import torch
from torch import Tensor

from matquant.formats.planes import group_count
from matquant.formats.tile_layout import TILE, pack_groups, pack_planes, tiles, turn_plane, unpack_groups, unpack_planes


@dataclasses.dataclass(frozen=True, slots=True)
class WeightShard:
    """Which part of a weight [out_features, in_features] is held.

    Attributes:
        out_features, in_features: of the whole.
        rows: ranges (start, stop) of rows, held one after the other. Rows beyond the weight are held as zeros.
        columns: the range (start, stop) of columns.
    """

    out_features: int
    in_features: int
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]

    def __post_init__(self) -> None:
        start, stop = self.columns
        if not 0 <= start < stop <= self.in_features or any(not 0 <= a <= b for a, b in self.rows):
            raise ValueError(f"no part of [{self.out_features}, {self.in_features}]: {self.rows}, {self.columns}")

    @classmethod
    def whole(cls, out_features: int, in_features: int) -> "WeightShard":
        return cls(out_features, in_features, ((0, out_features),), (0, in_features))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the part."""
        return sum(stop - start for start, stop in self.rows), self.columns[1] - self.columns[0]

    @property
    def between_tiles(self) -> bool:
        """Whether the part is made of whole tiles, or of such that end with the weight."""
        edges = [(start, stop, self.out_features) for start, stop in self.rows]
        edges.append((*self.columns, self.in_features))
        rows_fit = all((stop - start) % TILE == 0 for start, stop in self.rows[:-1])
        return rows_fit and all(
            start % TILE == 0 and stop <= end and (stop % TILE == 0 or stop == end) for start, stop, end in edges
        )

    def group_size(self, group_size: int) -> int:
        """The group size of the part: that of the whole, or the largest that divides it and fits the cut."""
        start, stop = self.columns
        if group_size == self.in_features:
            return stop - start
        return math.gcd(group_size, start, stop - start)

    def codes(self, codes: Tensor) -> Tensor:
        """The part of any [out_features, in_features]."""
        return _rows(codes[:, slice(*self.columns)], self.rows, self.out_features)

    def plane(self, plane: Tensor, index: int) -> Tensor:
        """The part of one plane.

        Args:
            plane: int32 [tiles of rows, tiles of columns, 32, 4], as in ``formats.tile_layout``.
            index: which plane it is, 0 for the most significant.

        Returns:
            int32, likewise, for the shape of the part.
        """
        if self.between_tiles:
            side = plane[:, self.columns[0] // TILE : tiles(self.columns[1])]
            return torch.cat([side[start // TILE : tiles(stop)] for start, stop in self.rows])
        part = self.codes(unpack_planes(turn_plane(plane, index)[None])[: self.out_features, : self.in_features])
        rows, columns = self.shape
        padded = part.new_zeros(tiles(rows) * TILE, tiles(columns) * TILE)
        padded[:rows, :columns] = part
        return turn_plane(pack_planes(padded, 1)[0], -index)

    def groups(self, packed: Tensor, group_size: int) -> Tensor:
        """The part of scales or zero points [groups, tiles of rows, 8, 4, 2] of groups of ``group_size``."""
        values = unpack_groups(packed)[: self.out_features, : self.in_features // group_size]
        return self.pack_plain_groups(values, group_size)

    def pack_plain_groups(self, values: Tensor, group_size: int) -> Tensor:
        """The same from [out_features, groups], one row after the other."""
        own = self.group_size(group_size)
        first = torch.arange(*self.columns, own, device=values.device)  # the first column of each group of the part
        part = _rows(values[:, first // group_size], self.rows, self.out_features)
        return pack_groups(part, group_count(self.shape[1], own))


def _rows(values: Tensor, rows: tuple[tuple[int, int], ...], count: int) -> Tensor:
    parts = []
    for start, stop in rows:
        parts.append(values[start : min(stop, count)])
        beyond = stop - max(start, count)
        if beyond > 0:
            parts.append(values.new_zeros(beyond, values.shape[1]))
    return torch.cat(parts)
