"""Block types of GGUF: which hold the values of a slice exactly, and the nearest values in the others."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matquant.formats.groups import group_count
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.pack.gguf import type_choice
from matquant.pack.gguf.block_types import BLOCK_TYPES, WHOLE_NUMBERS
from matquant.pack.gguf.type_choice import SliceLayer

TYPES = {kind.name: gguf.GGMLQuantizationType[kind.name] for kind in BLOCK_TYPES}


def dequantize(data: Any, name: str) -> Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(np.asarray(data), TYPES[name])))


@st.composite
def weights(draw: st.DrawFn) -> NestedWeight:
    """Random codes, scales of both signs and zero, and formats of the default method and others."""
    slicing = draw(st.sampled_from(["msb", "round"]))
    group_size = draw(st.sampled_from([32, 64, 96, 128]))
    columns = 32 * draw(st.integers(1, 8))
    group_size = min(group_size, columns)
    rows = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, group_count(columns, group_size))

    def scales() -> Tensor:
        values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-2, 1))
        return torch.where(torch.rand(shape, generator=generator) < 0.1, 0, values).to(dtype)

    own = draw(st.sampled_from([(), (2,), (3, 4)]))
    offset = 0.0 if slicing == "round" else draw(st.sampled_from([0.0, 8.0, 16.0]))
    stretch = 1.0 if slicing == "round" else draw(st.sampled_from([1.0, 1.25, 1.5]))
    return NestedWeight(
        codes=torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator),
        scales=scales(),
        zeros=None,
        own_scales={bits: scales() for bits in own},
        format=WeightFormat(
            group_size=group_size,
            slicing=slicing,
            zero_point_offset=offset,
            scale_dtype=dtype,
            scale_bits=own,
            stretch=stretch,
        ),
    )


@settings(deadline=None, max_examples=60)
@given(weight=weights(), bits=st.integers(2, 8))
def test_exact_types_hold_every_value(weight: NestedWeight, bits: int) -> None:
    layer = SliceLayer.measure("x", weight, bits)
    for kind in layer.exact:
        data = type_choice.encode(layer, weight, kind)
        assert data.shape == (len(weight.codes), kind.row_bytes(weight.codes.shape[1]))
        assert torch.equal(dequantize(data, kind.name), weight.dequantize(bits))
    predicted = type_choice.representative(_spec(weight), bits)
    assert predicted is not None
    assert set(predicted.exact) <= set(layer.exact)  # fewer codes may fit more types


def _spec(weight: NestedWeight) -> Any:
    from matquant.formats.packed import LayerSpec

    return LayerSpec.from_weight(weight)


@pytest.mark.parametrize(
    ("slicing", "offset", "stretch", "expected"),
    [
        ("msb", 8.0, 1.0, ["Q5_0", "Q5_0", "Q4_0", "Q8_0", "Q8_0", None, None]),
        ("msb", 8.0, 1.25, ["Q5_0", "Q5_0", "Q4_0", None, None, None, None]),
        ("msb", 0.0, 1.0, ["Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0", None]),
        ("round", 0.0, 1.0, ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"]),
    ],
)
def test_smallest_exact_type_of_each_width(
    slicing: Any, offset: float, stretch: float, expected: list[str | None]
) -> None:
    fmt = WeightFormat(group_size=64, slicing=slicing, zero_point_offset=offset, stretch=stretch)
    weight = NestedWeight(
        codes=torch.arange(256, dtype=torch.uint8)[None].repeat(2, 1),
        scales=torch.tensor([[0.01, -0.02, 0.3, -0.001]]).repeat(2, 1).half(),
        zeros=None,
        format=fmt,
    )
    found = [SliceLayer.measure("x", weight, bits).exact for bits in range(2, 9)]
    assert [kinds[0].name if kinds else None for kinds in found] == expected


@pytest.mark.parametrize("large", [1e5, 3e38])
@pytest.mark.parametrize("small", [1e-9, 1e-30])
def test_scales_beyond_float16_are_not_exact(large: float, small: float) -> None:
    for value in (large, small):
        weight = NestedWeight(
            codes=torch.arange(64, dtype=torch.uint8)[None],
            scales=torch.tensor([[0.5, value]]).bfloat16(),
            zeros=None,
            format=WeightFormat(group_size=32, zero_point_offset=8.0, scale_dtype=torch.bfloat16),
        )
        assert SliceLayer.measure("x", weight, 4).exact == ()


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_nearest_values_of_each_type(kind: Any) -> None:
    """No worse than rounding to the widest grid of each block, and exact for zeros and for constants."""
    values = torch.randn(8, 512, generator=torch.Generator().manual_seed(kind.bits)) * 0.03
    found = dequantize(kind.nearest(values.view(-1, kind.block_size)).view(8, -1), kind.name)
    blocks = values.view(-1, 16)
    step = 2 * blocks.abs().amax(1, keepdim=True) / (2**kind.bits - 1)
    rounded = ((blocks / step - 0.5).round() + 0.5) * step
    assert (found - values).norm() < 1.25 * (rounded.view_as(values) - values).norm()
    for constant in (0.0, 0.25, -0.25):
        same = torch.full((1, 256), constant)
        back = dequantize(kind.nearest(same.view(-1, kind.block_size)).view(1, -1), kind.name)
        assert torch.allclose(back, same, rtol=0.02)


@pytest.mark.parametrize(
    ("bits", "offset", "name", "group_size", "largest"),
    [
        (2, 8.0, "Q2_K", 256, 1e-6),  # one group covers the block
        (2, 8.0, "Q2_K", 128, 0.02),
        (3, 16.0, "Q3_K", 256, 1e-6),  # the offset puts zero on the grid of the type
        (3, 16.0, "Q3_K", 128, 0.01),
        (3, 8.0, "Q3_K", 128, 0.15),
    ],
)
def test_slices_in_k_types(bits: int, offset: float, name: str, group_size: int, largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = NestedWeight(
        codes=torch.randint(0, 256, (32, 256), dtype=torch.uint8, generator=generator),
        scales=(torch.randn(32, 256 // group_size, generator=generator) * 0.01).half(),
        zeros=None,
        format=WeightFormat(group_size=group_size, zero_point_offset=offset),
    )
    layer = SliceLayer.measure("x", weight, bits)
    (kind,) = (kind for kind in BLOCK_TYPES if kind.name == name)
    found = dequantize(type_choice.encode(layer, weight, kind), name)
    exact = weight.dequantize(bits)
    assert (found - exact).norm() / exact.norm() < largest


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_nearest_is_no_worse_than_the_package_gguf(name: str) -> None:
    values = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    (kind,) = (kind for kind in WHOLE_NUMBERS if kind.name == name)
    own = dequantize(kind.nearest(values.view(-1, 32)).view(16, -1), name)
    other = dequantize(gguf.quants.quantize(values.numpy(), TYPES[name]), name)
    assert (own - values).norm() <= (other - values).norm()


def test_embeddings_take_the_smallest_exact_type() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounded = dequantize(gguf.quants.quantize(values.numpy(), TYPES["Q8_0"]), "Q8_0")
    assert type_choice.dense_type(rounded, "auto") == "Q8_0"
    assert type_choice.dense_type(rounded[:, :40], "auto") == "F32"  # rows of no whole blocks
    assert type_choice.dense_type(values.half(), "auto") == "F16"
    assert type_choice.dense_type((values * 1e-7).bfloat16(), "auto") == "BF16"
    assert type_choice.dense_type(values, "auto") == "F32"
