"""Bit planes against the definition of the layout, bit by bit, and against the nested format."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import make_weight, unpack

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, planes_read
from matquant.formats.packed import LayerSpec
from matquant.formats.planes import CPU_STRIP_WEIGHTS, NestedPlanes

GROUP_SIZES = (16, 32, 48, 64, 128, 5)


@st.composite
def any_weight(draw) -> NestedWeight:
    columns, master_bits = draw(st.integers(1, 400)), draw(st.integers(2, 8))
    scale_bits = draw(st.sampled_from([(), (2,), (2, 3, 4)]))
    slicing, stretch = draw(st.sampled_from([("msb", 1.0), ("msb", 1.25), ("msb", 1.5), ("round", 1.0)]))
    return make_weight(
        draw(st.integers(1, 150)),
        columns,
        min(columns, draw(st.sampled_from((*GROUP_SIZES, columns)))),
        master_bits=master_bits,
        slicing=slicing,
        stretch=stretch,
        zeros=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 8.0, 0.1, -3.5])),
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        seed=draw(st.integers(0, 2**20)),
        scale_bits=tuple(bits for bits in scale_bits if bits < master_bits),
    )


def test_position_of_each_bit():
    weight = make_weight(128, 192, 64, master_bits=8)
    packed = NestedPlanes.pack(weight)
    words = packed.planes.long() & 0xFFFFFFFF
    seen = torch.zeros_like(words)
    generator = torch.Generator().manual_seed(1)
    for plane in range(8):
        for row, column in zip(
            torch.randint(128, (64,), generator=generator).tolist(),
            torch.randint(192, (64,), generator=generator).tolist(),
            strict=True,
        ):
            c, p, g = row % 64 // 16, row % 16 // 8, row % 8
            r, u, t, h = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
            place = (3 - p + 2 * c + 8 * u + 16 * h - plane) % 32
            word = words[plane, row // 64, column // 64, 4 * g + t, r].item()
            assert (word >> place) & 1 == (weight.codes[row, column].item() >> (7 - plane)) & 1
            seen[plane, row // 64, column // 64, 4 * g + t, r] |= 1 << place
    assert seen.any()


def test_position_and_padding_of_scales_and_zero_points():
    weight = make_weight(70, 96, 32, zeros=True)
    packed = NestedPlanes.pack(weight)
    assert packed.scales.shape == packed.zeros.shape == (4, 2, 8, 4, 2)  # 128 columns of tiles are four groups
    for row in range(128):
        c, p, g = row % 64 // 16, row % 16 // 8, row % 8
        for group in range(4):
            inside = row < 70 and group < 3
            at = (group, row // 64, g, c, p)
            assert packed.scales[at] == (weight.scales[row, group] if inside else 0)
            assert packed.zeros[at] == (weight.zeros[row, group] if inside else 0)


def test_one_scale_per_row_is_one_group():
    assert NestedPlanes.pack(make_weight(64, 100, 100)).scales.shape[0] == 1


@settings(max_examples=60, deadline=None)
@given(weight=any_weight())
def test_pack_round_trip(weight):
    found = unpack(NestedPlanes.pack(weight))
    assert found.format == weight.format
    assert found.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert found.tensors()[name].dtype == tensor.dtype
        assert torch.equal(found.tensors()[name], tensor)


@settings(max_examples=60, deadline=None)
@given(weight=any_weight(), data=st.data())
def test_dequantize_equals_that_of_the_codes(weight, data):
    bits = data.draw(st.integers(2, weight.format.master_bits))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    assert torch.equal(NestedPlanes.pack(weight).dequantize(bits, dtype), weight.dequantize(bits, dtype))


@settings(max_examples=60, deadline=None)
@given(weight=any_weight(), data=st.data())
def test_top_planes_hold_all_smaller_bit_widths(weight, data):
    top = data.draw(st.integers(2, weight.format.master_bits))
    packed = NestedPlanes.pack(weight, max_bits=top)
    whole = NestedPlanes.pack(weight)
    assert packed.planes.shape[0] == planes_read(top, weight.format.master_bits, weight.format.slicing)
    if packed.planes.shape[0] == weight.format.master_bits:
        top = (
            weight.format.master_bits
        )  # a round slice reads one more plane, so that the two largest bit-widths read all
    assert packed.max_bits == top
    assert torch.equal(packed.planes, whole.planes[: packed.planes.shape[0]])
    for bits in range(2, top + 1):
        assert torch.equal(packed.dequantize(bits), weight.dequantize(bits))
        assert packed.bytes_read(bits) == whole.bytes_read(bits)
    for bits in range(top + 1, weight.format.master_bits + 1):
        with pytest.raises(UserError, match=f"{bits} bits cannot be read; .* at most {top} bits"):
            packed.dequantize(bits)


def test_strips_of_a_weight():
    weight = make_weight(300, 96, 32, zeros=True)
    strips = list(NestedPlanes.pack(weight).dequantize_strips(3, size=64 * 96))
    assert [(rows.start, rows.stop) for rows, _ in strips] == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 300)]
    assert torch.equal(torch.cat([values for _, values in strips]), weight.dequantize(3))


def test_weight_of_several_strips():
    weight = make_weight(300, CPU_STRIP_WEIGHTS // 128, 32)
    packed = NestedPlanes.pack(weight)
    assert torch.equal(unpack(packed).codes, weight.codes)
    assert torch.equal(packed.dequantize(3), weight.dequantize(3))


@settings(max_examples=40, deadline=None)
@given(weight=any_weight(), data=st.data())
def test_planned_bytes_are_those_of_the_tensors(weight, data):
    spec, planes = LayerSpec.from_weight(weight), data.draw(st.integers(2, 8))
    assert spec.parent_bytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    stored = spec.tensors("x", 8)
    fmt = weight.format
    beyond = {f"x.scales{bits}" for bits in fmt.scale_bits if fmt.planes_read(bits) > planes}
    side = sum(tensor.nbytes for name, tensor in stored.items() if ".plane" not in name and name not in beyond)
    assert spec.packed_bytes(planes) == side + planes * stored["x.plane0"].nbytes
    packed = NestedPlanes.pack(weight)
    own = sum(scales.nbytes for scales in packed.own_scales.values())
    assert spec.packed_bytes(packed.planes.shape[0]) == packed.bytes_read(fmt.master_bits) + own


def test_bytes_read():
    packed = NestedPlanes.pack(make_weight(128, 256, 64, slicing="round", zeros=True))
    side = 128 * 4 * (2 + 1)
    assert [packed.bytes_read(b) for b in (2, 7, 8)] == [128 * 256 // 8 * planes + side for planes in (3, 8, 8)]


@pytest.mark.parametrize("bits", [0, 1, 9, 2.5, "4", None])
def test_invalid_bit_width_raises(bits):
    packed = NestedPlanes.pack(make_weight(8, 16, 16))
    with pytest.raises(UserError, match=r"bits: a bit-width must be a whole number in 2..8; found"):
        packed.dequantize(bits)


def test_more_bits_than_the_codes_raise():
    weight = make_weight(8, 16, 16, master_bits=4)
    with pytest.raises(UserError, match=r"5 bits cannot be read; 4 of 4 planes .* at most 4 bits"):
        NestedPlanes.pack(weight).dequantize(5)
    with pytest.raises(UserError, match="max_bits=5 is no bit-width of codes of 4 bits"):
        NestedPlanes.pack(weight, max_bits=5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"planes": torch.zeros(8, 2, 3, 32, 4)}, "found float32"),
        ({"planes": torch.zeros(8, 2, 2, 32, 4, dtype=torch.int32)}, r"found int32 \[8, 2, 2, 32, 4\]"),
        ({"planes": torch.zeros(9, 2, 3, 32, 4, dtype=torch.int32)}, "9 planes are more than the 8 bits"),
        ({"planes": torch.zeros(8, 2, 32, 3, 4, dtype=torch.int32).transpose(2, 3)}, "found non-contiguous int32"),
        ({"scales": torch.zeros(3, 2, 8, 4, 2, dtype=torch.float64)}, "Scales of groups of 64"),
        ({"scales": torch.zeros(4, 2, 8, 4, 2)}, r"found float32 \[4, 2, 8, 4, 2\]"),
        ({"zeros": torch.zeros(3, 2, 8, 4, 2)}, "Zero points must be contiguous uint8"),
        ({"scales": torch.zeros(3, 2, 8, 4, 2, device="meta")}, "must be on one device"),
        ({"group_size": 96}, r"Scales of groups of 96 must be .*\[2, 2, 8, 4, 2\]; found float16 \[3, 2, 8, 4, 2\]"),
        ({"group_size": 193}, r"The group size of 192 input features must lie in 1..192; found 193"),
        ({"group_size": 0}, r"The group size of 192 input features must lie in 1..192; found 0"),
        ({"master_bits": 9}, "Codes of 9 bits"),
        ({"slicing": "top"}, "'top' slicing"),
    ],
)
def test_mismatched_tensors_raise(wrong, message):
    packed = NestedPlanes.pack(make_weight(70, 192, 64, zeros=True))
    with pytest.raises(UserError, match=message):
        _replace(packed, wrong)


def _replace(packed, changes):
    """Copy with some fields of the planes or of their format replaced."""
    own = {name: value for name, value in changes.items() if name in ("planes", "scales", "zeros")}
    fmt = {name: value for name, value in changes.items() if name not in own}
    return dataclasses.replace(packed, **own, format=dataclasses.replace(packed.format, **fmt))
