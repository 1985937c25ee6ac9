"""Stored layers that share an input in one launch: outputs, bit-widths, storage, and layers that stay separate."""

from typing import Any

import pytest
import torch
from test_sharded_linear import assert_near
from torch import Tensor
from weights import make_weight

from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec
from matquant.formats.planes import NestedPlanes
from matquant.inference.shard import WeightShard
from matquant.vllm.fused_linears import fuse
from matquant.vllm.sharded_linear import ShardedDenseLinear, ShardedNestedLinear, finish_loading

COLUMNS, GROUP = 192, 64
ROWS = (128, 64, 70)


def make_member(weight: NestedWeight, bits: int = 4, num_planes: int = 8) -> ShardedNestedLinear:
    spec = LayerSpec.from_weight(weight)
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    shard = WeightShard.whole(*weight.codes.shape)
    return ShardedNestedLinear("layer", spec, stored, shard, num_planes=num_planes, bits=bits, prefill=bits)


def make_members(rows=ROWS, **options: Any) -> tuple[list[ShardedNestedLinear], list[NestedWeight]]:
    """Layers with one input, not loaded, and their weights."""
    weights = [make_weight(count, COLUMNS, GROUP, seed=i, **options) for i, count in enumerate(rows)]
    return [make_member(weight) for weight in weights], weights


def load(members: list[ShardedNestedLinear], weights: list[NestedWeight]) -> None:
    for member, weight in zip(members, weights, strict=True):
        packed = NestedPlanes.pack(weight)
        tensors = {f"plane{index}": plane for index, plane in enumerate(packed.planes)}
        tensors |= {"scales": packed.scales} | {f"scales{bits}": one for bits, one in packed.own_scales.items()}
        for kind, tensor in (tensors | ({} if packed.zeros is None else {"zeros": packed.zeros})).items():
            member.load(kind, tensor)
    finish_loading(members)


def product(x: Tensor, weights: list[NestedWeight], bits: Any) -> Tensor:
    return torch.cat([x @ weight.dequantize(width).T for weight, width in zip(weights, bits, strict=True)], -1)


@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"scale_bits": (2, 4)}, {"stretch": 1.25}])
def test_neighbours_of_equal_bit_width_share_a_product(options, launches):
    members, weights = make_members(**options)
    fused = fuse(members)
    load(members, weights)
    for bits, products in (
        ((4, 4, 4), [(262, 4)]),
        ((2, 2, 8), [(192, 2), (70, 8)]),
        ((2, 8, 8), [(128, 2), (134, 8)]),
        ((3, 2, 4), [(128, 3), (64, 2), (70, 4)]),
        ((8, 8, 8), [(262, 8)]),
    ):
        for member, width in zip(members, bits, strict=True):
            member.set_bits(width, width)
        for bias in (None, torch.randn(262)):
            launches.clear()
            x = torch.randn(2, 3, COLUMNS)
            assert_near(fused(x, bias), product(x, weights, bits) + (0 if bias is None else bias))
            assert launches == products
        for member, weight, width in zip(members, weights, bits, strict=True):
            assert_near(member(x, None), x @ weight.dequantize(width).T)


def test_members_hold_no_memory_of_their_own_and_their_planes_go_and_come_back_together():
    members, weights = make_members()
    fused = fuse(members)
    load(members, weights)
    x = torch.randn(2, COLUMNS)
    storage = fused.planes.untyped_storage()
    assert all(member.planes.untyped_storage().data_ptr() == storage.data_ptr() for member in members)
    assert len({id(member.memory) for member in members}) == 1
    whole = storage.nbytes()
    assert members[1].memory.keep(3)
    assert storage.nbytes() == whole * 3 // 8
    for bits in (2, 8):
        for member in members:
            member.memory.keep(bits)
            member.set_bits(bits, bits)
        assert_near(fused(x, None), product(x, weights, [bits] * 3))


def test_readers_of_fused_layers_read_the_same_memory():
    members, weights = make_members()
    fused = fuse(members)
    load(members, weights)
    readers = [member.reader(2) for member in members]
    draft = fuse(readers)
    assert draft.planes is fused.planes
    x = torch.randn(2, COLUMNS)
    assert_near(draft(x, None), product(x, weights, (2, 2, 2)))
    assert_near(fused(x, None), product(x, weights, (4, 4, 4)))


def test_compiled_layers_read_their_bits_at_run_time():
    members, weights = make_members(scale_bits=(2, 3))
    fused = fuse(members)
    load(members, weights)
    x, graphs = torch.randn(2, COLUMNS), []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for bits in ((2, 2, 2), (8, 2, 2), (5, 5, 5)):
        for member, width in zip(members, bits, strict=True):
            member.set_bits(width, width)
        assert_near(compiled(x, None), product(x, weights, bits))
    assert len(graphs) == 1


def test_layers_that_have_no_common_form_stay_separate():
    (first, second, third), _ = make_members()
    assert fuse([first]) is None
    assert fuse([third, first]) is None  # 70 rows end in a tile
    dense = ShardedDenseLinear("dense", WeightShard.whole(64, COLUMNS), torch.float32)
    assert fuse([first, dense]) is None
    assert fuse([first, make_member(make_weight(64, COLUMNS, 32))]) is None
    assert fuse([first, make_member(make_weight(64, COLUMNS, GROUP), bits=3, num_planes=3)]) is None
    assert fuse([first, second.reader(2)]) is None
    assert first.planes.is_contiguous()
    assert fuse([first.reader(2), second.reader(2)]) is None  # readers of layers that are not fused
    assert fuse([first, second]) is not None


@pytest.mark.parametrize("options", [{}, {"slicing": "round", "offset": 0.0}])
def test_members_of_several_widths_read_the_planes_that_are_left(options):
    members, weights = make_members(**options)
    fused = fuse(members)
    load(members, weights)
    x = torch.randn(2, COLUMNS)
    members[0].memory.keep(members[0].format.planes_read(3))
    for bits in ((2, 3, 3), (3, 3, 2), (2, 3, 2)):
        for member, width in zip(members, bits, strict=True):
            member.set_bits(width, width)
        assert_near(fused(x, None), product(x, weights, bits))
