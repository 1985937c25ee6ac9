"""Parts of packed weights against parts of the dense one."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.inference import NestedPlanes
from matquant.inference.shard import WeightShard


@st.composite
def cuts(draw: st.DrawFn) -> tuple[NestedWeight, WeightShard]:
    group = draw(st.sampled_from((32, 64, 128)))
    columns, rows = group * draw(st.integers(1, 4)), draw(st.integers(1, 200))
    size = columns if draw(st.booleans()) else group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = NestedWeight(
        codes=torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8),
        scales=torch.randn(rows, columns // size, generator=generator).half(),
        zeros=torch.randint(256, (rows, columns // size), generator=generator, dtype=torch.uint8),
        format=WeightFormat(
            master_bits=8, slicing="msb", group_size=size, has_zero_points=True, scale_dtype=torch.float16
        ),
    )
    edge = st.one_of(st.integers(0, rows), st.integers(0, rows // 64).map(lambda tile: 64 * tile), st.just(rows))
    ranges = [tuple(sorted((draw(edge), draw(edge)))) for _ in range(draw(st.integers(1, 3)))]
    last = (ranges[-1][0], max(ranges[-1][1] + draw(st.sampled_from((0, 0, 70))), ranges[-1][0] + 1))
    process_group = draw(st.sampled_from([n for n in (1, 2, 4) if columns % n == 0]))
    rank, part = draw(st.integers(0, process_group - 1)), columns // process_group
    return weight, WeightShard(rows, columns, (*ranges[:-1], last), (rank * part, (rank + 1) * part))


@settings(max_examples=120, deadline=None)
@given(cuts(), st.integers(2, 8))
def test_a_part_decodes_to_the_part_of_the_weight(case, bits):
    weight, cut = case
    whole = NestedPlanes.pack(weight)
    part = NestedPlanes(
        planes=torch.stack([cut.plane(plane, index) for index, plane in enumerate(whole.planes)]),
        scales=cut.groups(whole.scales, weight.format.group_size),
        zeros=cut.groups(whole.zeros, weight.format.group_size),
        out_features=cut.shape[0],
        in_features=cut.shape[1],
        format=dataclasses.replace(weight.format, group_size=cut.group_size(weight.format.group_size)),
    )
    dense = torch.cat([weight.dequantize(bits), torch.zeros(200, cut.in_features)])  # rows beyond the weight are zeros
    expected = torch.cat([dense[start:stop] for start, stop in cut.rows])[:, slice(*cut.columns)]
    assert torch.equal(part.dequantize(bits), expected)
    assert torch.equal(NestedPlanes.pack(part.unpack()).planes, part.planes)  # what fills up tiles is zero
