"""Groups: consecutive input features of a row that share a scale.

The groups of a row have ``group_size`` features each. If that does not divide the input features, the last group is shorter. A
group size is at most the number of input features; equal to it, the row is one group.
"""

import torch
from torch import Tensor

WHOLE_ROW = -1  # setting for one group per row


def fit_group_size(group_size: int, in_features: int) -> int:
    """Group size of a row for a setting: a setting that exceeds the row, or ``WHOLE_ROW``, gives one group."""
    return in_features if group_size == WHOLE_ROW else min(group_size, in_features)


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups of a row, a short last one included."""
    return -(-in_features // group_size)


def group_index(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group of each input feature: int64 [in_features]."""
    return torch.arange(in_features, device=device) // group_size


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Repeat the value of each group for its input features: [rows, groups] to [rows, in_features]."""
    return values[:, group_index(in_features, group_size, values.device)]


def scale_groups(values: Tensor, scales: Tensor, zero_points: Tensor | float, group_size: int) -> Tensor:
    """Replace float32 values by scale * (value - zero point) of their group, in place.

    Args:
        values: [rows, in_features].
        scales: float32 [rows, groups].
        zero_points: in the shape of ``scales``, or one number for all.

    Returns:
        ``values``.
    """
    return multiply_groups(subtract_zero_points(values, zero_points, group_size), scales, group_size)


def subtract_zero_points(values: Tensor, zero_points: Tensor | float, group_size: int) -> Tensor:
    """Subtract the zero point of their group, or one number for all, from values [rows, in_features], in place."""
    if not isinstance(zero_points, Tensor):
        return values.sub_(zero_points)
    for groups, part in _whole_and_short(values, group_size):
        part -= zero_points[:, groups, None]
    return values


def multiply_groups(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Multiply values [rows, in_features] by the scale of their group, [rows, groups], in place."""
    for groups, part in _whole_and_short(values, group_size):
        part *= scales[:, groups, None]
    return values


def largest_of_groups(matrix: Tensor, group_size: int) -> Tensor:
    """Largest absolute value of each group: [rows, in_features] to [rows, groups]."""
    return torch.cat([part.abs().amax(2) for _, part in _whole_and_short(matrix, group_size)], 1)


def sum_groups(matrix: Tensor, group_size: int) -> Tensor:
    """Sums over the columns of each group: [rows, in_features] to [rows, groups]."""
    return torch.cat([part.sum(2) for _, part in _whole_and_short(matrix, group_size)], 1)


def _whole_and_short(matrix: Tensor, group_size: int) -> list[tuple[slice, Tensor]]:
    """Groups, and their views [rows, groups, size] of a matrix [rows, in_features]: all whole ones, and a short last one."""
    count, rest = divmod(matrix.shape[1], group_size)
    views = [(slice(0, count), matrix[:, : count * group_size].unflatten(1, (-1, group_size)))]
    return [*views, (slice(count, count + 1), matrix[:, None, count * group_size :])] if rest else views
