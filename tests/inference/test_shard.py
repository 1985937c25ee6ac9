"""Shards of packed weights against slices of the dense weight."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import make_weight, unpack

from matquant.formats.nested import NestedWeight
from matquant.formats.planes import NestedPlanes
from matquant.inference.shard import WeightShard


@st.composite
def shards(draw: st.DrawFn) -> tuple[NestedWeight, WeightShard]:
    columns = draw(
        st.one_of(st.sampled_from((72, 200, 576)), st.integers(1, 8).map(lambda n: 32 * n), st.integers(1, 300))
    )
    rows, size = draw(st.integers(1, 200)), min(columns, draw(st.sampled_from((32, 64, 128, columns))))
    weight = make_weight(rows, columns, size, zeros=True, seed=draw(st.integers(0, 2**32)))
    edge = st.one_of(st.integers(0, rows), st.integers(0, rows // 64).map(lambda tile: 64 * tile), st.just(rows))
    ranges = [tuple(sorted((draw(edge), draw(edge)))) for _ in range(draw(st.integers(1, 3)))]
    last = (ranges[-1][0], max(ranges[-1][1] + draw(st.sampled_from((0, 0, 70))), ranges[-1][0] + 1))
    world_size = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if columns % n == 0]))
    rank, part = draw(st.integers(0, world_size - 1)), columns // world_size
    return weight, WeightShard(rows, columns, (*ranges[:-1], last), (rank * part, (rank + 1) * part))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(shards(), st.integers(2, 8))
def test_shard_dequantizes_to_the_slice_of_the_weight(case, bits):
    weight, shard = case
    whole = NestedPlanes.pack(weight)
    packed = NestedPlanes(
        planes=torch.stack([shard.slice_plane(plane, index) for index, plane in enumerate(whole.planes)]),
        scales=shard.slice_packed_groups(whole.scales, weight.format.group_size),
        zeros=shard.slice_packed_groups(whole.zeros, weight.format.group_size),
        out_features=shard.shape[0],
        in_features=shard.shape[1],
        format=dataclasses.replace(weight.format, group_size=shard.group_size(weight.format.group_size)),
    )
    dense = torch.cat(
        [weight.dequantize(bits), torch.zeros(200, shard.in_features)]
    )  # rows beyond the weight are zeros
    expected = torch.cat([dense[start:stop] for start, stop in shard.rows])[:, slice(*shard.columns)]
    assert torch.equal(packed.dequantize(bits), expected)
    assert torch.equal(NestedPlanes.pack(unpack(packed)).planes, packed.planes)  # the padding is zero


@pytest.mark.parametrize(
    ("columns", "group_size", "held", "expected"),
    [
        (576, 128, (0, 288), 128),  # the second half starts 96 columns before the end of a group
        (576, 128, (288, 576), 32),
        (200, 128, (0, 100), 100),  # one group
        (200, 128, (100, 200), 4),
        (200, 200, (100, 200), 100),
        (1440, 32, (720, 1440), 16),
        (72, 64, (64, 72), 8),
        (512, 128, (256, 512), 128),
    ],
)
def test_group_size_of_a_shard(columns, group_size, held, expected):
    """The largest divisor of the group size whose groups do not cross those of the whole weight."""
    assert WeightShard(64, columns, ((0, 64),), held).group_size(group_size) == expected
