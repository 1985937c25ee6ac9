"""Random weights in the nested format, for tests."""

import torch

from matquant.formats.nested import NestedWeight, WeightFormat


def make_weight(
    rows, columns, group_size, master_bits=8, slicing="msb", zeros=False, offset=8.0, dtype=torch.float16, seed=0
) -> NestedWeight:
    """Random codes, scales of both signs and some zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    top = 2**master_bits
    return NestedWeight(
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
        ),
    )
