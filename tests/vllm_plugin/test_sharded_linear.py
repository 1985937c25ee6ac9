"""Shards of stored layers in the vLLM plugin: loading, bit-widths, and matmuls that read them at run time."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.matgptq import MatGptqSpec
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec
from matquant.formats.planes import NestedPlanes
from matquant.inference.shard import WeightShard
from matquant.vllm import vllm_ops
from matquant.vllm.sharded_linear import ShardedDenseLinear, ShardedNestedLinear, finish_loading

ROWS, COLUMNS, GROUP = 96, 192, 64
WHOLE = WeightShard.whole(ROWS, COLUMNS)


def make_layer(shard: WeightShard, num_planes: int = 8, bits: int = 4, **options: Any) -> ShardedNestedLinear:
    spec = LayerSpec.from_weight(nested_weight(**options))
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    return ShardedNestedLinear("layer", spec, stored, shard, num_planes=num_planes, bits=bits, prefill=bits)


def nested_weight(slicing: str = "msb", **options: Any) -> NestedWeight:
    return make_weight(ROWS, COLUMNS, GROUP, slicing=slicing, offset=8.0 if slicing == "msb" else 0.0, **options)


def load(layer: ShardedNestedLinear, **options: Any) -> ShardedNestedLinear:
    packed = NestedPlanes.pack(nested_weight(**options))
    layer.load("scales", packed.scales)
    for bits, scales in packed.own_scales.items():
        layer.load(f"scales{bits}", scales)
    for index, plane in enumerate(packed.planes):
        layer.load(f"plane{index}", plane)
    return layer


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compare up to the order of float32 sums."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scale_bits", [(), (2, 4)])
def test_two_ranks_hold_halves_of_a_layer(rank, scale_bits):
    x, options = torch.randn(3, COLUMNS), {"scale_bits": scale_bits}
    columns = slice(rank * 96, rank * 96 + 96)  # no multiple of a tile or of a group
    by_columns = load(
        make_layer(WeightShard(ROWS, COLUMNS, ((0, ROWS),), (columns.start, columns.stop)), **options), **options
    )
    rows = slice(rank * 48, rank * 48 + 48)
    by_rows = load(
        make_layer(WeightShard(ROWS, COLUMNS, ((rows.start, rows.stop),), (0, COLUMNS)), **options), **options
    )
    assert by_columns.format.group_size == (64, 32)[rank]  # the second half starts in the middle of a group
    for bits in (2, 4, 8):
        by_columns.set_bits(bits, bits)
        by_rows.set_bits(bits, bits)
        dense = nested_weight(**options).dequantize(bits)
        assert_near(by_columns(x[:, columns], None), x[:, columns] @ dense[:, columns].T)
        assert_near(by_rows(x, None), x @ dense[rows].T)


@pytest.mark.parametrize(("columns", "ranks"), [(576, 2), (200, 2), (72, 3)])
@pytest.mark.parametrize("zeros", [False, True])
def test_ranks_cut_a_layer_with_a_short_last_group(columns, ranks, zeros):
    """Cuts within groups and within tiles: the parts' outputs add up to that of the whole layer."""
    weight = make_weight(ROWS, columns, min(columns, 128), zeros=zeros)
    spec, packed, x = LayerSpec.from_weight(weight), NestedPlanes.pack(weight), torch.randn(3, columns)
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    for bits in (2, 5):
        total = torch.zeros(3, ROWS)
        for rank in range(ranks):
            held = (rank * columns // ranks, (rank + 1) * columns // ranks)
            shard = WeightShard(ROWS, columns, ((0, ROWS),), held)
            layer = ShardedNestedLinear("layer", spec, stored, shard, num_planes=8, bits=bits, prefill=bits)
            tensors = {"scales": packed.scales, "zeros": packed.zeros} | {
                f"plane{index}": plane for index, plane in enumerate(packed.planes)
            }
            for kind in stored:
                layer.load(kind, tensors[kind])
            finish_loading([layer])
            assert_near(
                layer(x[:, slice(*held)], None), x[:, slice(*held)] @ weight.dequantize(bits)[:, slice(*held)].T
            )
            total += layer(x[:, slice(*held)], None)
        assert_near(total, x @ weight.dequantize(bits).T)


def test_compiled_layer_reads_its_bits_at_run_time():
    options = {"scale_bits": (2, 3)}
    layer = load(make_layer(WHOLE, **options), **options)
    x = torch.randn(2, COLUMNS)
    addresses = [buffer.data_ptr() for buffer in layer.buffers()]
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for bits in (2, 8, 5):
        layer.set_bits(bits, bits)
        assert_near(compiled(x, None), x @ nested_weight(**options).dequantize(bits).T)
    assert len(graphs) == 1
    assert [buffer.data_ptr() for buffer in layer.buffers()] == addresses


def test_planes_that_are_not_kept_are_dropped():
    options = {"scale_bits": (2, 3, 4)}
    layer = load(make_layer(WHOLE, num_planes=3, bits=3, **options), **options)
    finish_loading([layer])
    assert layer.planes.shape[0] == 3
    assert {name for name, _ in layer.named_buffers()} == {"planes", "scales", "scales2", "scales3", "step_bits"}
    with pytest.raises(UserError, match="layer: 4 bits cannot be read; 3 of 8 planes"):
        layer.set_bits(4, 3)
    assert layer.bits == (3, 3)


def test_published_codes_become_planes():
    weight = nested_weight("round")
    published = MatGptqSpec(group_size=GROUP, bits=4, scale_dtype=torch.float16)
    spec = published.layer_spec("layer", ROWS, COLUMNS)
    stored = {key.removeprefix("layer."): tensor for key, tensor in published.tensors({"layer": spec}).items()}
    shard = WeightShard(ROWS, COLUMNS, ((10, 90),), (96, 192))
    layer = ShardedNestedLinear("layer", spec, stored, shard, num_planes=8, bits=3, prefill=3)
    layer.load("qweight", weight.codes)
    layer.load("scales", weight.scales)
    finish_loading([layer])
    x = torch.randn(2, 96)
    assert_near(layer(x, None), x @ weight.dequantize(3)[10:90, 96:].T)


def test_dense_layer_holds_its_shard():
    layer = ShardedDenseLinear("layer", WeightShard(ROWS, COLUMNS, ((10, 90),), (96, 192)), torch.float32)
    with pytest.raises(UserError, match=r"do not hold layer.weight\."):
        finish_loading([layer])
    with pytest.raises(UserError, match=r"layer.weight is \[96, 96\] .* needs \[96, 192\]"):
        layer.load("weight", torch.zeros(96, 96))
    dense = torch.randn(ROWS, COLUMNS)
    layer.load("weight", dense)
    finish_loading([layer])
    assert torch.equal(layer.weight, dense[10:90, 96:])


def test_missing_and_wrong_tensors_raise():
    layer = make_layer(WHOLE)
    with pytest.raises(UserError, match=r"do not hold layer.plane0, layer.plane1, layer.plane2 and 6 more"):
        finish_loading([layer])
    for wrong in (torch.zeros(2, 3, 32, 4), torch.zeros(1, 3, 32, 4, dtype=torch.int32)):
        with pytest.raises(UserError, match=r"layer.plane0 is .*, but the checkpoint's config says"):
            layer.load("plane0", wrong)
    with pytest.raises(UserError, match="layer.plane8 is"):
        layer.load("plane8", NestedPlanes.pack(nested_weight()).planes[0])


@pytest.fixture
def set_step(monkeypatch):
    """Function that sets the step which vLLM's forward context describes."""

    def call(mode: str, metadata: Any) -> None:
        context = SimpleNamespace(cudagraph_runtime_mode=SimpleNamespace(name=mode), attn_metadata=metadata)
        module: Any = SimpleNamespace(is_forward_context_available=lambda: True, get_forward_context=lambda: context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", module)

    return call


@dataclasses.dataclass
class FlashAttentionMetadata:
    max_query_len: int


@dataclasses.dataclass
class FlashInferMetadata:
    num_prefills: int


@pytest.mark.parametrize(
    ("mode", "metadata", "bits"),
    [
        ("NONE", {"layer": FlashAttentionMetadata(1)}, 2),
        ("NONE", {"layer": FlashAttentionMetadata(7)}, 8),
        ("NONE", {"layer": FlashInferMetadata(0)}, 2),
        ("NONE", {"layer": FlashInferMetadata(2)}, 8),
        ("NONE", {"mamba": FlashInferMetadata(0), "layer": FlashAttentionMetadata(3)}, 8),
        ("NONE", [{"layer": FlashAttentionMetadata(1)}, {"layer": FlashAttentionMetadata(5)}], 8),
        ("NONE", [{"layer": FlashAttentionMetadata(1)}, {"layer": FlashInferMetadata(0)}], 2),
        ("NONE", {}, 8),
        ("NONE", None, 8),
        ("FULL", {"layer": FlashAttentionMetadata(1)}, 2),
        ("PIECEWISE", {"layer": FlashAttentionMetadata(1)}, 8),
    ],
)
def test_bits_of_the_current_step(set_step, mode, metadata, bits):
    set_step(mode, metadata)
    assert vllm_ops.current_bits(vllm_ops.new_step_bits(2, 8)) == bits
    assert vllm_ops.current_bits(vllm_ops.new_step_bits(3, 3)) == 3


@pytest.mark.parametrize("metadata", [SimpleNamespace(), SimpleNamespace(num_actual_tokens=3)])
def test_backend_that_does_not_tell_the_kind_of_step_raises(set_step, metadata):
    set_step("NONE", {"layer": metadata})
    with pytest.raises(
        UserError, match=r"metadata of vLLM \(SimpleNamespace\) does not say .* another --attention-backend"
    ):
        vllm_ops.current_bits(vllm_ops.new_step_bits(2, 8))
    assert vllm_ops.current_bits(vllm_ops.new_step_bits(4, 4)) == 4


@pytest.mark.parametrize("tokens", [(1, COLUMNS), (3, COLUMNS), (3, 1, COLUMNS)], ids=str)
@pytest.mark.parametrize(("new_tokens", "bits"), [(1, 2), (4, 8)])
def test_shape_of_the_input_does_not_decide_the_bits(set_step, tokens, new_tokens, bits):
    """An expert, for example, gets some of the tokens of a step."""
    layer = load(make_layer(WHOLE))
    layer.set_bits(2, 8)
    set_step("NONE", {"layer": FlashAttentionMetadata(new_tokens)})
    x = torch.randn(*tokens)
    assert_near(layer(x, None), x @ nested_weight().dequantize(bits).T)


@pytest.mark.parametrize("shard", [WHOLE, WeightShard(ROWS, COLUMNS, ((10, 90),), (96, 192))], ids=["whole", "shard"])
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"scale_bits": (2, 3)}, {"stretch": 1.25}], ids=str)
def test_dummy_values_are_finite_small_and_the_same_at_every_start(shard, options):
    weight = make_weight(ROWS, COLUMNS, GROUP, **options)
    spec = LayerSpec.from_weight(weight)
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    layers = [
        ShardedNestedLinear("layer", spec, stored, shard, num_planes=8, bits=bits, prefill=bits) for bits in (8, 8, 2)
    ]
    finish_loading(layers, is_dummy=True)
    first, again, low = (layer(torch.eye(shard.shape[1]), None) for layer in layers)
    assert 1e-5 < first.abs().mean() <= first.abs().max() < 3e-3
    assert (first > 0).any()
    assert (first < 0).any()
    assert torch.equal(first, again)
    assert not torch.equal(first, low)


def test_dummy_dense_layer():
    layer = ShardedDenseLinear("layer", WHOLE, torch.float32)
    finish_loading([layer], is_dummy=True)
    assert 0 < layer.weight.abs().max() <= 1e-3
