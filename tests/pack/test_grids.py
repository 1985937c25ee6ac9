"""Slices as whole-number codes: where they are exact, where not, and how near the nearest come."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.pack.integer_grid import exact_grid, nearest, on_grid, pack_bits, zero_points

ALL = [(bits, symmetric) for symmetric in (True, False) for bits in range(2, 9)]


@st.composite
def weights(draw: st.DrawFn) -> NestedWeight:
    master, slicing = draw(st.sampled_from((4, 6, 8))), draw(st.sampled_from(("msb", "round")))
    own_zeros = draw(st.booleans())
    offset = 0.0 if slicing == "round" or own_zeros else draw(st.sampled_from((0.0, 0.5, 2.0, 8.0, 12.0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(2**master, (3, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(2**master, (3, 2), generator=generator, dtype=torch.uint8) if own_zeros else None
    scales = torch.randn(3, 2, generator=generator).half()
    scales[0, 0] = 0
    return NestedWeight(
        codes=codes,
        scales=scales,
        zeros=zeros,
        format=WeightFormat(
            master_bits=master,
            slicing=slicing,
            zero_point_offset=offset,
            group_size=32,
            has_zero_points=own_zeros,
            scale_dtype=torch.float16,
        ),
    )


@settings(max_examples=150, deadline=None)
@given(weights(), st.integers(2, 8), st.integers(0, 1))
def test_codes_of_an_exact_grid_decode_to_the_slice(weight, width, least_zero):
    width = min(width, weight.format.master_bits)
    zeros = zero_points(weight).flatten().tolist()
    grid = exact_grid(width, weight.format.master_bits, weight.format.slicing, zeros, ALL, least_zero)
    if grid is None:
        return
    stored = on_grid(weight, width, grid, least_zero)
    assert int(stored.codes.max()) < 2**grid.bits
    assert least_zero <= int(stored.zeros.min()) <= int(stored.zeros.max()) < 2**grid.bits
    assert not grid.symmetric or set(stored.zeros.flatten().tolist()) == {2 ** (grid.bits - 1)}
    assert torch.equal(stored.dequantize(), weight.dequantize(width))


@pytest.mark.parametrize(
    ("slicing", "offset", "found"),
    [
        ("round", 0, {b: (b, True) for b in range(2, 9)}),
        ("msb", 0, {b: (b + 1, True) for b in range(2, 8)} | {8: None}),
        ("msb", 8, {2: (5, True), 3: (5, True), 4: (4, True), 5: (7, True), 6: (8, True), 7: (8, False), 8: None}),
    ],
)
def test_smallest_codes(slicing, offset, found):
    grids = {b: exact_grid(b, 8, slicing, [128.0 + offset], ALL) for b in range(2, 9)}
    assert {b: grid and (grid.bits, grid.symmetric) for b, grid in grids.items()} == found


@pytest.mark.slow
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("offset", [0, 2, 8, 20])
def test_no_smaller_symmetric_codes_exist(width, offset):
    """By trying every step of a grid, not only powers of two."""
    levels = [Fraction(2) ** (8 - width) * (c + Fraction(1, 2)) - 128 - offset for c in range(2**width)]
    grid = exact_grid(width, 8, "msb", [128.0 + offset], ALL[:7])
    for bits in range(2, grid.bits if grid else 9):
        middle = 2 ** (bits - 1)
        for steps in range(1, 2**bits):
            step = (levels[1] - levels[0]) / steps
            codes = [level / step for level in levels]
            whole = all(code.denominator == 1 for code in codes)
            up, down = max(codes) < middle and min(codes) >= -middle, max(codes) <= middle and min(codes) > -middle
            assert not (whole and (up or down)), (bits, steps)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 80), st.integers(0, 2**32))
def test_bits_follow_each_other_as_in_one_large_number(bits, count, seed):
    values = torch.randint(2**bits, (2, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (2, -(-count * bits // 32))
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        number = sum(value << bits * i for i, value in enumerate(row))
        assert [word % 2**32 for word in words] == [number >> 32 * i & 0xFFFFFFFF for i in range(len(words))]


def test_nearest_codes_are_at_least_as_near_as_plain_rounding():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, 256), generator=generator, dtype=torch.uint8)
    scales = torch.randn(64, 8, generator=generator).half()
    weight = NestedWeight(
        codes=codes,
        scales=scales,
        zeros=None,
        format=WeightFormat(
            master_bits=8, slicing="msb", zero_point_offset=8.0, group_size=32, scale_dtype=torch.float16
        ),
    )
    dense = weight.dequantize(8).view(64, 8, -1)
    for bits in range(2, 9):
        stored = nearest(weight, 8, bits)
        step = dense.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        plain = (dense / step).round() * step
        assert (stored.dequantize().view_as(dense) - dense).norm() <= (plain - dense).norm()
        assert int(stored.codes.max()) < 2**bits
