"""Random weights in the nested format, and the inverse of packing."""

import torch

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import unpack_groups, unpack_planes


def make_weight(
    rows,
    columns,
    group_size,
    master_bits=8,
    slicing="msb",
    zeros=False,
    offset=8.0,
    dtype=torch.float16,
    seed=0,
    scale_bits=(),
    stretch=1.0,
) -> NestedWeight:
    """Random codes, sets of scales of both signs and, with ``zeros``, zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    top = 2**master_bits
    own_scales = {bits: (torch.randn(rows, groups, generator=generator) * 0.02).to(dtype) for bits in scale_bits}
    return NestedWeight(
        own_scales=own_scales,
        codes=torch.randint(top, (rows, columns), generator=generator).to(torch.uint8),
        scales=(torch.randn(rows, groups, generator=generator) * 0.01).to(dtype),
        zeros=torch.randint(top, (rows, groups), generator=generator).to(torch.uint8) if zeros else None,
        format=WeightFormat(
            master_bits=master_bits,
            slicing=slicing,
            zero_point_offset=0.0 if zeros else offset,
            group_size=group_size,
            has_zero_points=zeros,
            scale_dtype=dtype,
            scale_bits=scale_bits,
            stretch=stretch,
        ),
    )


def rounded_weight(dense: torch.Tensor) -> NestedWeight:
    """Dense weight [out, in] rounded to nearest: 8 bits, zero-point offset 8, groups of 32."""
    groups = dense.reshape(dense.shape[0], -1, 32)
    scales = (groups.abs().amax(-1) / 119).half()
    codes = (groups / scales.float()[..., None] + 135.5).round().clamp(0, 255).to(torch.uint8)
    return NestedWeight(
        codes=codes.view(dense.shape),
        scales=scales,
        zeros=None,
        format=WeightFormat(
            master_bits=8, slicing="msb", zero_point_offset=8.0, group_size=32, scale_dtype=torch.float16
        ),
    )


def unpack(packed: NestedPlanes) -> NestedWeight:
    """Inverse of ``NestedPlanes.pack``; bits of missing planes are 0."""
    rows, columns, fmt = packed.out_features, packed.in_features, packed.format
    groups = -(-columns // fmt.group_size)
    return NestedWeight(
        codes=unpack_planes(packed.planes)[:rows, :columns] >> (8 - fmt.master_bits),
        scales=unpack_groups(packed.scales)[:rows, :groups],
        zeros=None if packed.zeros is None else unpack_groups(packed.zeros)[:rows, :groups],
        format=fmt,
        own_scales={bits: unpack_groups(scales)[:rows, :groups] for bits, scales in packed.own_scales.items()},
    )
