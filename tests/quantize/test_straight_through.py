"""Straight-through slices: values and stored weights against brute force, gradients against formulas derived by hand."""

import math

import numpy as np
import pytest
import torch

from matquant.formats.groups import expand_groups
from matquant.formats.nested import WeightFormat
from matquant.quantize.straight_through import MinMaxGrid, group_ranges

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(24, 8), (20, 8), (12, 12)]  # input features, group size; the second has a short last group


def weight_format(group_size: int, master_bits: int = 8) -> WeightFormat:
    return WeightFormat(group_size=group_size, master_bits=master_bits, slicing="round", has_zero_points=True)


def random_weight(columns: int, rows: int = 5) -> torch.Tensor:
    """Weights of both signs; one group of zeros, one of positive and one of negative weights."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * 0.05
    weight[0] = 0
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    return weight


def rounded(value: float) -> int:
    return math.floor(value + 0.5)


def brute_force(weight: torch.Tensor, group_size: int, master_bits: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and slice of a weight, element by element."""
    top, codes, dense = 2**master_bits - 1, np.zeros(weight.shape, int), np.zeros(weight.shape, np.float32)
    for row, values in enumerate(weight.numpy()):
        for start in range(0, len(values), group_size):
            group = values[start : start + group_size]
            lowest, highest = min(0.0, *group.tolist()), max(0.0, *group.tolist())
            scale = np.float32(np.float16(np.float32(highest - lowest) / np.float32(top)))
            zero = min(max(rounded(-lowest / scale), 0), top) if scale else 0
            for k, value in enumerate(group):
                code = min(max(rounded(float(value) / scale + zero), 0), top) if scale else 0
                kept = min(rounded(code / 2 ** (master_bits - bits)), 2**bits - 1) * 2 ** (master_bits - bits)
                codes[row, start + k] = code
                dense[row, start + k] = np.float32(kept - zero) * scale
    return codes, dense


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize(("master_bits", "bits"), [(8, 2), (8, 3), (8, 8), (4, 4), (6, 2)])
def test_codes_and_slices_are_those_of_brute_force(columns: int, group_size: int, master_bits: int, bits: int) -> None:
    weight, fmt = random_weight(columns), weight_format(group_size, master_bits)
    grid = MinMaxGrid.of_ranges(*group_ranges(weight, group_size), fmt)
    codes, dense = brute_force(weight, group_size, master_bits, bits)
    found = grid.codes(weight)
    stored = grid.to_nested(found, columns)
    assert np.array_equal(stored.codes.numpy(), codes)
    assert np.array_equal(grid.slice(found, bits, columns).numpy(), dense)
    assert torch.equal(stored.dequantize(bits), grid.slice(found, bits, columns))


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_the_weight_is_one_where_no_clamp_acts(columns: int, group_size: int, bits: int) -> None:
    weight = random_weight(columns).requires_grad_()
    lowest, highest = group_ranges(weight.detach(), group_size)
    grid = MinMaxGrid.of_ranges(0.7 * lowest, 0.6 * highest, weight_format(group_size))
    coefficients = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (grid.slice(grid.codes(weight), bits, columns) * coefficients).sum().backward()
    inside = (weight.detach() >= expand_groups(0.7 * lowest, columns, group_size) - 1e-4) & (
        weight.detach() <= expand_groups(0.6 * highest, columns, group_size) + 1e-4
    )
    codes = grid.to_nested(grid.codes(weight.detach()), columns).codes.int()
    expected = coefficients * (inside & (codes < 256 - 2 ** (7 - bits))) * (torch.arange(5) > 0)[:, None]
    found = weight.grad * (torch.arange(5) > 0)[:, None]  # a group of zeros has no position
    assert 0.2 < (expected != 0).float().mean() < 0.95
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_the_range_is_that_derived_by_hand(columns: int, group_size: int, bits: int) -> None:
    """W = s (k - z), s = (h - l) / T, z = -l / s: dW/ds = k - z - w / s where no clamp acts, else k - z, and then dz counts."""
    weight, top = random_weight(columns)[3:].double().float(), 255
    lowest, highest = (0.8 * ends for ends in group_ranges(weight, group_size))
    lowest, highest = lowest.requires_grad_(), highest.requires_grad_()
    grid = MinMaxGrid.of_ranges(lowest, highest, weight_format(group_size))
    coefficients = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    codes = grid.codes(weight)
    (grid.slice(codes, bits, columns) * coefficients).sum().backward()

    s, z, low = (expand_groups(t.detach(), columns, group_size) for t in (grid.scales, grid.zeros, lowest))
    q = codes.detach().flatten(1)[:, :columns]
    position = torch.floor(weight / s + z + 0.5)
    free = (position >= 0) & (position <= top) & (torch.floor(q / 2 ** (8 - bits) + 0.5) <= 2**bits - 1)
    k = torch.clamp(torch.floor(q / 2 ** (8 - bits) + 0.5), max=2**bits - 1) * 2 ** (8 - bits)
    by_scale = torch.where(free, k - z - weight / s, k - z - low / s) / top  # with dz/ds = l / s^2
    by_low = torch.where(free, -by_scale, 1 - by_scale)  # with dz/dl = -1 / s
    for found, expected in ((highest.grad, by_scale), (lowest.grad, by_low)):
        sums = torch.zeros_like(found).index_add_(1, torch.arange(columns) // group_size, coefficients * expected)
        torch.testing.assert_close(found, sums, rtol=1e-3, atol=1e-4)
    assert 0 < free.float().mean() < 1


def test_a_group_of_zeros_stays_zero_with_finite_gradients() -> None:
    weight = torch.zeros(2, 8, requires_grad=True)
    lowest, highest = (ends.detach().requires_grad_() for ends in group_ranges(weight, 4))
    grid = MinMaxGrid.of_ranges(lowest, highest, weight_format(4))
    dense = grid.slice(grid.codes(weight), 2, 8)
    dense.sum().backward()
    assert not dense.any()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (weight, lowest, highest))
