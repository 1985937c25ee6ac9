"""Scales of one bit-width in closed form, for codes that are given.

A row of values is linear in the scales of its groups, w = sum_g s_g c_g, where c_g holds the values of the codes of group g in
units of the scale, and 0 elsewhere. So the objective (t - w) H (t - w)^T is quadratic in the scales, with its minimum at the
solution of

    A s = b        A_gh = c_g H c_h^T        b_g = c_g H t^T
"""

import torch
from torch import Tensor

from matquant.formats.groups import expand_groups, group_count, sum_groups

_ROWS_AT_ONCE_BYTES = 2**28  # of the systems of some rows, in float64
_RIDGE = 1e-6  # relative to the diagonal; a group whose values do not matter keeps its scale


def refit_scales(values: Tensor, target: Tensor, hessian: Tensor | None, scales: Tensor, group_size: int) -> Tensor:
    """Least-squares scales of all groups.

    A group whose solution is not positive and finite keeps its scale.

    Args:
        values: float32 [rows, columns], value of each code in units of its scale, zero point subtracted.
        target: float32 [rows, columns], rows that the weights should equal.
        hessian: float32 [columns, columns], damped; None weighs all columns equally.
        scales: float32 [rows, groups], present scales, not negative.

    Returns:
        float32 [rows, groups].
    """
    if hessian is None:
        return _accept(sum_groups(target * values, group_size) / sum_groups(values**2, group_size), scales)
    groups = group_count(values.shape[1], group_size)
    rows_at_once = max(1, _ROWS_AT_ONCE_BYTES // (8 * groups * groups))
    parts = [
        _refit_rows(*part, hessian, group_size)
        for part in zip(values.split(rows_at_once), target.split(rows_at_once), scales.split(rows_at_once), strict=True)
    ]
    return torch.cat(parts)


def _refit_rows(values: Tensor, target: Tensor, scales: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    rows, columns = values.shape
    groups = scales.shape[1]
    matrix = values.new_empty(rows, groups, groups, dtype=torch.float64)
    for group in range(groups):
        own = slice(group * group_size, min((group + 1) * group_size, columns))
        matrix[:, group] = sum_groups((values[:, own] @ hessian[own]).mul_(values), group_size)
    # Solved for the change of the scales: the ridge then pulls towards the present ones.
    residual = target - values * expand_groups(scales, columns, group_size)
    vector = sum_groups((residual @ hessian).mul_(values), group_size).double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal + torch.finfo(torch.float32).tiny
    change = torch.linalg.solve(matrix, vector[:, :, None])[:, :, 0]
    return _accept((scales + change).float(), scales)


def _accept(fitted: Tensor, scales: Tensor) -> Tensor:
    """Fitted scales where they are positive and finite, else the present ones."""
    return torch.where((fitted > 0) & torch.isfinite(fitted), fitted, scales)
