"""Nested format against its formulas, computed element by element in plain Python."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.formats.bits import STRETCHES
from matquant.formats.nested import NestedWeight, WeightFormat, levels, planes_read, slice_codes
from matquant.formats.parent import read_block, write_block
from matquant.store import Store

SLICINGS = ("msb", "round")
GRIDS = [(master, bits) for master in range(2, 9) for bits in range(1, master + 1)]


def plain_slice(code: int, bits: int, master_bits: int, slicing: str) -> int:
    """c_b(q) in the docstring of the module."""
    drop = master_bits - bits
    if drop == 0:
        return code
    kept = code // 2**drop
    return kept if slicing == "msb" else min(kept + code // 2 ** (drop - 1) % 2, 2**bits - 1)


def plain_units(code: int, bits: int, master_bits: int, slicing: str, stretch: float = 1.0) -> Fraction:
    """Value of a code in units of the scale, before the zero point."""
    if stretch != 1:  # each plane adds or subtracts its step
        steps = [
            Fraction(2) ** (master_bits - 2 - plane) * Fraction(stretch if plane > 3 else 1) for plane in range(bits)
        ]
        signs = [1 if code >> (master_bits - 1 - plane) & 1 else -1 for plane in range(bits)]
        return 2 ** (master_bits - 1) + sum(sign * step for sign, step in zip(signs, steps, strict=True))
    centre = Fraction(1, 2) if slicing == "msb" else 0
    return 2 ** (master_bits - bits) * (plain_slice(code, bits, master_bits, slicing) + centre)


@st.composite
def weights(draw, slicings=SLICINGS, symmetric=None) -> NestedWeight:
    """Random weight in any format whose values are exact in float32."""
    master_bits = draw(st.integers(2, 8))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 15))
    group_size = draw(st.integers(1, columns))
    groups = -(-columns // group_size)  # the last one may be shorter
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    codes = torch.randint(2**master_bits, (rows, columns), generator=generator).to(torch.uint8)
    # Few mantissa bits, both signs, and some zeros.
    scales = torch.randint(-9, 10, (rows, groups), generator=generator) * 2.0 ** draw(st.integers(-10, 2))
    symmetric = draw(st.booleans()) if symmetric is None else symmetric
    zeros = None if symmetric else torch.randint(2**master_bits, scales.shape, generator=generator).to(torch.uint8)
    scale_dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    slicing = draw(st.sampled_from(slicings))
    return NestedWeight(
        codes=codes,
        scales=scales.to(scale_dtype),
        zeros=zeros,
        format=WeightFormat(
            master_bits=master_bits,
            slicing=slicing,
            stretch=draw(st.sampled_from(STRETCHES)) if slicing == "msb" else 1.0,
            zero_point_offset=draw(st.sampled_from([0.0, 8.0, 0.25, -3.5])) if symmetric else 0.0,
            group_size=group_size,
            has_zero_points=not symmetric,
            scale_dtype=scale_dtype,
        ),
    )


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize(("master_bits", "bits"), GRIDS)
def test_slices_equal_integer_arithmetic(master_bits, bits, slicing):
    codes = torch.arange(2**master_bits).to(torch.uint8)
    sliced = slice_codes(codes, bits, master_bits, slicing)
    assert sliced.dtype == torch.uint8
    assert sliced.tolist() == [plain_slice(q, bits, master_bits, slicing) for q in range(2**master_bits)]
    units = levels(bits, master_bits, slicing)
    assert units.dtype == torch.float32
    assert units.tolist() == [float(plain_units(q, bits, master_bits, slicing)) for q in range(2**master_bits)]


@pytest.mark.parametrize(("slicing", "stretch"), [("round", 1.25), ("msb", 1.1), ("msb", 2.0), ("msb", 0.75)])
def test_stretch_that_no_kernel_has_raises(slicing, stretch):
    with pytest.raises(ValueError, match=f"{slicing} slices have no stretch of {stretch}"):
        WeightFormat(group_size=32, slicing=slicing, stretch=stretch)


@pytest.mark.parametrize("stretch", [1.25, 1.5])
def test_stretch_changes_no_slice_of_up_to_four_bits(stretch):
    for bits in range(2, 9):
        same = torch.equal(levels(bits, 8, "msb", stretch), levels(bits, 8, "msb"))
        assert same == (bits <= 4)


@pytest.mark.parametrize(("master_bits", "bits"), GRIDS)
def test_msb_slice_of_a_slice_is_a_slice(master_bits, bits):
    codes = torch.arange(2**master_bits).to(torch.uint8)
    for between in range(bits, master_bits + 1):
        twice = slice_codes(slice_codes(codes, between, master_bits, "msb"), bits, between, "msb")
        assert torch.equal(twice, slice_codes(codes, bits, master_bits, "msb"))


def test_slice_with_more_bits_than_the_codes_raises():
    with pytest.raises(ValueError, match="5 bits cannot be cut from codes of 4 bits"):
        slice_codes(torch.zeros(1, dtype=torch.uint8), 5, 4, "msb")


@settings(max_examples=150, deadline=None)
@given(weight=weights(), data=st.data())
def test_dequantize_equals_the_formula_per_element(weight, data):
    bits = data.draw(st.integers(1, weight.format.master_bits))
    dense = weight.dequantize(bits)
    assert (dense.dtype, dense.shape) == (torch.float32, weight.codes.shape)
    for i, row in enumerate(weight.codes.tolist()):
        for j, code in enumerate(row):
            group = j // weight.format.group_size
            if weight.zeros is None:
                zero = 2 ** (weight.format.master_bits - 1) + Fraction(weight.format.zero_point_offset)
            else:
                zero = Fraction(weight.zeros[i, group].item())
            fmt = weight.format
            units = plain_units(code, bits, fmt.master_bits, fmt.slicing, fmt.stretch)
            assert dense[i, j].item() == float(Fraction(weight.scales[i, group].item()) * (units - zero))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weight.dequantize(bits, dtype), dense.to(dtype))


@settings(max_examples=50, deadline=None)
@given(weight=weights(), data=st.data())
def test_zero_scale_dequantizes_to_zero(weight, data):
    group = data.draw(st.integers(0, weight.scales.shape[1] - 1))
    weight.scales[:, group] = 0
    columns = slice(group * weight.format.group_size, (group + 1) * weight.format.group_size)
    zeroed = weight.dequantize(data.draw(st.integers(1, weight.format.master_bits)))[:, columns]
    assert zeroed.numel()
    assert (zeroed == 0).all()


@settings(max_examples=100, deadline=None)
@given(weight=weights(slicings=("msb",), symmetric=True), data=st.data())
def test_negative_scale_mirrors_the_grid(weight, data):
    """Complemented codes with the negated scale equal the codes with the negated offset."""
    bits = data.draw(st.integers(1, weight.format.master_bits))
    complements = (2**weight.format.master_bits - 1 - weight.codes.int()).to(torch.uint8)
    complemented = dataclasses.replace(weight, codes=complements, scales=-weight.scales)
    negated = dataclasses.replace(weight.format, zero_point_offset=-weight.format.zero_point_offset)
    mirrored = dataclasses.replace(weight, format=negated)
    assert torch.equal(complemented.dequantize(bits), mirrored.dequantize(bits))


@settings(max_examples=50, deadline=None)
@given(weight=weights(), data=st.data())
def test_bytes_read_counts_planes_scales_and_zero_points(weight, data):
    bits = data.draw(st.integers(1, weight.format.master_bits))
    planes = bits + (weight.format.slicing == "round" and bits < weight.format.master_bits)
    assert planes_read(bits, weight.format.master_bits, weight.format.slicing) == planes
    groups = weight.scales.numel()
    side = groups * weight.scales.element_size() + (0 if weight.zeros is None else groups)
    assert weight.bytes_read(bits) == -(-weight.codes.numel() * planes // 8) + side


@settings(max_examples=50, deadline=None)
@given(weight=weights(), data=st.data())
def test_slice_ignores_unread_planes(weight, data):
    bits = data.draw(st.integers(1, weight.format.master_bits))
    unread = weight.format.master_bits - planes_read(bits, weight.format.master_bits, weight.format.slicing)
    changed = NestedWeight(
        codes=weight.codes ^ (2**unread - 1), scales=weight.scales, zeros=weight.zeros, format=weight.format
    )
    assert torch.equal(weight.dequantize(bits), changed.dequantize(bits))


@pytest.mark.parametrize(("master_bits", "bits"), GRIDS)
def test_slices_equal_symmetric_integer_codes(master_bits, bits):
    """A ``round`` slice equals b-bit codes c - 2^(b-1), an ``msb`` slice odd (b+1)-bit codes 2 c + 1 at half the scale."""
    codes = torch.arange(2**master_bits).to(torch.uint8)[None]
    scale = 0.375
    step = scale * 2 ** (master_bits - bits)
    for slicing in SLICINGS:
        weight = NestedWeight(
            codes=codes,
            scales=torch.tensor([[scale]]),
            zeros=None,
            format=WeightFormat(
                master_bits=master_bits, slicing=slicing, group_size=codes.shape[1], scale_dtype=torch.float32
            ),
        )
        sliced = slice_codes(codes, bits, master_bits, slicing).float()
        expected = step * (sliced - 2 ** (bits - 1)) if slicing == "round" else step / 2 * (2 * sliced + 1 - 2**bits)
        assert torch.equal(weight.dequantize(bits), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": torch.zeros(2, 6)},
        {"codes": torch.zeros(2, 6, dtype=torch.int32)},
        {"codes": torch.zeros(12, dtype=torch.uint8)},
        {"codes": torch.zeros(2, 7, dtype=torch.uint8)},
        {"codes": torch.zeros(2, 2, dtype=torch.uint8), "scales": torch.zeros(2, 1)},
        {"scales": torch.zeros(3, 2)},
        {"zeros": torch.zeros(2, 1, dtype=torch.uint8)},
        {"zeros": torch.zeros(3, 2, dtype=torch.uint8)},
    ],
    ids=[
        "float codes",
        "int32 codes",
        "flat codes",
        "a third group",
        "long group",
        "rows of scales",
        "few zeros",
        "rows of zeros",
    ],
)
def test_mismatched_tensors_raise(wrong):
    right = {
        "codes": torch.zeros(2, 6, dtype=torch.uint8),
        "scales": torch.zeros(2, 2),
        "zeros": torch.zeros(2, 2, dtype=torch.uint8),
    }
    fmt = WeightFormat(group_size=3, has_zero_points=True, scale_dtype=torch.float32)
    NestedWeight(**right, format=fmt)
    with pytest.raises(ValueError, match="codes must be uint8|scales and zeros must be"):
        NestedWeight(**(right | wrong), format=fmt)


@settings(max_examples=10, deadline=None)
@given(given_weights=st.lists(weights(), min_size=1, max_size=3))
def test_stored_block_round_trip(tmp_path_factory, given_weights):
    named = {f"blocks.0.layer{i}": weight for i, weight in enumerate(given_weights)}
    record = {
        "layers": {n: {"shape": list(w.codes.shape), "errors": {"4": 0.5}} for n, w in named.items()},
        "notes": ["x"],
    }

    def build(draft):
        write_block(draft, "block-0000.safetensors", named, record)
        assert_equal(read_block(draft, "block-0000.safetensors")[0], named)
        return {"label": "parent"}

    artifact = Store(tmp_path_factory.mktemp("store")).open_or_build("parent", {"seed": 1}, build)
    found, kept = read_block(artifact, "block-0000.safetensors")
    assert_equal(found, named)
    assert kept["notes"] == ["x"]
    assert all(kept["layers"][n]["errors"] == {"4": 0.5} for n in named)


def assert_equal(found: dict[str, NestedWeight], expected: dict[str, NestedWeight]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        other = found[name]
        assert other.format == weight.format
        assert other.tensors().keys() == weight.tensors().keys()
        for part, tensor in weight.tensors().items():
            assert other.tensors()[part].dtype == tensor.dtype
            assert torch.equal(other.tensors()[part], tensor)
