"""Experts of one block computed together, without vLLM: outputs, bit-widths, storage, shards, and what stays separate."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fused_linears import load, make_member
from torch import Tensor
from weights import make_weight

from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec
from matquant.formats.planes import NestedPlanes
from matquant.inference import expert_reference
from matquant.inference.shard import WeightShard
from matquant.vllm.cuda_graphs import graph_tokens
from matquant.vllm.grouped_experts import GroupedExperts, group_experts
from matquant.vllm.sharded_linear import ShardedNestedLinear, finish_loading

HIDDEN, INNER, GROUP = 128, 64, 32
TWO, ONE = ("gate_proj", "up_proj"), ("gate_up_proj",)  # kinds of the first matrices


class Layer:
    """Experts with their weights.

    Args:
        held: ids of the experts on this device.
        options: of ``make_weight``.
    """

    def __init__(self, gate_up=TWO, held=range(4), inner=INNER, **options: Any) -> None:
        sizes = dict.fromkeys(gate_up, (2 * inner // len(gate_up), HIDDEN)) | {"down_proj": (HIDDEN, inner)}
        self.gate_up, self.kinds = gate_up, list(sizes)
        self._dense: dict[tuple[int, str, int], Tensor] = {}
        self.weights: dict[tuple[int, str], NestedWeight] = {
            (index, kind): make_weight(*size, GROUP, seed=10 * index + i, **options)
            for index in held
            for i, (kind, size) in enumerate(sizes.items())
        }
        self.members = {
            str(index): {kind: make_member(self.weights[index, kind]) for kind in self.kinds} for index in held
        }

    def all_members(self) -> list[ShardedNestedLinear]:
        return [member for expert in self.members.values() for member in expert.values()]

    def group(self, total: int = 4) -> GroupedExperts:
        made = group_experts(self.members, self.gate_up, "down_proj", total)
        assert made is not None
        load(self.all_members(), list(self.weights.values()))
        return made

    def dense(self, index: int, kind: str) -> Tensor:
        """Weight at the bit-width that its member holds, in float64."""
        key = (index, kind, self.members[str(index)][kind].bits[0])
        if key not in self._dense:
            self._dense[key] = self.weights[index, kind].dequantize(key[2]).double()
        return self._dense[key]

    def expected(self, x: Tensor, weights: Tensor, ids: Tensor, weight_input: bool = False) -> Tensor:
        """The sum over each token's experts, in float64, at the bit-widths that the members hold."""
        out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
        for token, choices in enumerate(ids.tolist()):
            for weight, index in zip(weights[token].double(), choices, strict=True):
                if str(index) not in self.members:
                    continue
                dense = {kind: self.dense(index, kind) for kind in self.kinds}
                row = x[token].double() * (weight if weight_input else 1)
                gate, up = torch.cat([dense[kind] @ row for kind in self.gate_up]).chunk(2)
                out[token] += (1 if weight_input else weight) * (dense["down_proj"] @ (F.silu(gate) * up))
        return out


def step(tokens: int, total: int = 4, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    weights, ids = torch.rand(tokens, total, generator=generator).topk(top_k)
    return x, weights, ids.int()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("gate_up", [TWO, ONE])
@pytest.mark.parametrize(
    "options", [{}, {"zeros": True}, {"scale_bits": (2, 4)}, {"stretch": 1.25}, {"slicing": "round", "offset": 0.0}]
)
def test_outputs_are_those_of_the_experts(options, gate_up):
    layer = Layer(gate_up, **options)
    grouped = layer.group()
    for widths in ([4], [8], [2, 4, 8], [2, 2, 8], [3, 4]):
        for i, member in enumerate(layer.all_members()):
            member.set_bits(widths[i % len(widths)], widths[i % len(widths)])
        for tokens in (1, 7):
            x, weights, ids = step(tokens)
            assert_near(grouped(x, weights, ids, F.silu), layer.expected(x, weights, ids))


@pytest.mark.parametrize("held", [(0, 1), (2, 3), (1, 3)])
def test_experts_of_other_devices_add_nothing(held):
    """Their ids reach this device too; the parts of all devices add up."""
    everywhere, here = Layer(), Layer(held=held)
    rest = Layer(held=[i for i in range(4) if i not in held])
    x, weights, ids = step(9)
    parts = [layer.group()(x, weights, ids, F.silu) for layer in (here, rest)]
    assert_near(parts[0], here.expected(x, weights, ids))
    assert_near(parts[0] + parts[1], everywhere.expected(x, weights, ids))
    assert here.expected(x, weights, ids).norm() < 0.95 * everywhere.expected(x, weights, ids).norm()


def test_router_weights_of_the_inputs():
    layer = Layer()
    grouped = layer.group()
    for top_k in (1, 2):
        x, weights, ids = step(5, top_k=top_k)
        found = grouped(x, weights, ids, F.silu, weight_input=True)
        assert_near(found, layer.expected(x, weights, ids, weight_input=True))
        assert (found.double() - layer.expected(x, weights, ids)).norm() > 0.05 * found.double().norm()


def test_bit_widths_of_the_step(monkeypatch):
    """Bit-widths of decoding or of prefill, read once for all matrices."""
    layer, found = Layer(), []
    grouped, product = layer.group(), expert_reference.grouped_linear
    monkeypatch.setattr(expert_reference, "grouped_linear", lambda call: found.append(call.bits) or product(call))
    for i, member in enumerate(layer.all_members()):
        member.set_bits(2 + i % 3, 8)
    asked = []
    for is_decode in (True, False):
        monkeypatch.setattr(
            "matquant.vllm.vllm_ops._is_decode_step", lambda tokens, answer=is_decode: asked.append(tokens) or answer
        )
        grouped(*step(3), F.silu)
    assert found == [[2, 3] * 4, [4] * 4, [8] * 8, [8] * 4]
    assert len(asked) == 4


def test_planes_are_held_once_and_may_move_to_the_host():
    layer = Layer()
    grouped = layer.group()
    x, weights, ids = step(6)
    for member in layer.all_members():
        member.set_bits(3, 3)
    before = grouped(x, weights, ids, F.silu)
    assert {member.memory for member in layer.all_members()} == {
        layer.members["0"]["gate_proj"].memory,
        layer.members["0"]["down_proj"].memory,
    }
    for member in layer.all_members():
        member.memory.keep(3)
    assert torch.equal(grouped(x, weights, ids, F.silu), before)
    assert grouped.down.planes.untyped_storage().nbytes() == 3 * grouped.down.planes[0].nbytes


def test_a_draft_model_reads_the_tensors_at_widths_of_its_own():
    layer = Layer()
    grouped = layer.group()
    readers = {
        index: {kind: member.reader(2) for kind, member in kinds.items()} for index, kinds in layer.members.items()
    }
    of_draft = group_experts(readers, layer.gate_up, "down_proj", 4)
    assert of_draft is not None
    assert of_draft.down.planes is grouped.down.planes
    for member in layer.all_members():
        member.set_bits(8, 8)
    x, weights, ids = step(4)
    assert_near(grouped(x, weights, ids, F.silu), layer.expected(x, weights, ids))
    for member in layer.all_members():
        member.set_bits(2, 2)
    assert_near(of_draft(x, weights, ids, F.silu), layer.expected(x, weights, ids))


def cut_member(weight: NestedWeight, shard: WeightShard) -> ShardedNestedLinear:
    """Shard of one matrix, loaded."""
    spec = LayerSpec.from_weight(weight)
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    return ShardedNestedLinear("layer", spec, stored, shard, num_planes=8, bits=4, prefill=4)


def test_tensor_parallel_shards_add_up():
    whole = Layer(inner=256)
    x, weights, ids = step(5)
    total = torch.zeros(5, HIDDEN, dtype=torch.bfloat16)
    for first in (0, 128):
        held = (first, first + 128)
        shards = dict.fromkeys(TWO, WeightShard(256, HIDDEN, (held,), (0, HIDDEN)))
        shards["down_proj"] = WeightShard(HIDDEN, 256, ((0, HIDDEN),), held)
        members = {
            str(index): {kind: cut_member(whole.weights[index, kind], shards[kind]) for kind in whole.kinds}
            for index in range(4)
        }
        grouped = group_experts(members, TWO, "down_proj", 4)
        assert grouped is not None
        for index, kinds in members.items():
            for kind, member in kinds.items():
                packed = NestedPlanes.pack(whole.weights[int(index), kind])
                for name, tensor in {
                    **{f"plane{i}": one for i, one in enumerate(packed.planes)},
                    "scales": packed.scales,
                }.items():
                    member.load(name, tensor)
                finish_loading([member])
        total += grouped(x, weights, ids, F.silu)
    assert_near(total, whole.expected(x, weights, ids))


@pytest.mark.parametrize(
    "layer",
    [Layer(inner=96), Layer(ONE, inner=48), Layer(held=(2,))],
    ids=["rows beside whole tiles", "one tile and a half", "a single expert"],
)
def test_experts_that_stay_separate(layer):
    before = [member.bits for member in layer.all_members()]
    assert group_experts(layer.members, layer.gate_up, "down_proj", 4) is None
    load(layer.all_members(), list(layer.weights.values()))
    assert [member.bits for member in layer.all_members()] == before


def test_experts_of_several_formats_stay_separate():
    layer, other = Layer(), Layer(stretch=1.25)
    layer.members["1"] = other.members["1"]
    assert group_experts(layer.members, layer.gate_up, "down_proj", 4) is None


def test_steps_of_a_graph_are_computed_together_before_and_during_its_capture():
    """A loop before the capture would not load the kernels that the capture needs."""
    layer = Layer()
    grouped = group_experts(layer.members, layer.gate_up, "down_proj", 4, graph_tokens=512)
    assert grouped is not None
    for tokens, together in ((128, True), (512, True), (513, False)):
        x, _, ids = step(tokens)
        assert grouped.prefers(x.half(), ids) == together


@pytest.mark.parametrize(
    ("mode", "sizes", "tokens"),
    [("FULL", [1, 8, 512], 512), ("PIECEWISE", [16, 4], 16), ("NONE", [512], 0), ("FULL", [], 0), ("FULL", None, 0)],
)
def test_largest_step_of_a_graph(mode, sizes, tokens):
    config = SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode), cudagraph_capture_sizes=sizes)
    assert graph_tokens(config) == tokens
    config.cudagraph_mode = None
    assert graph_tokens(config) == 0


def test_the_kernels_take_few_tokens_in_half_precision():
    grouped = Layer().group()
    for tokens, dtype, preferred in (
        (1, torch.bfloat16, True),
        (128, torch.float16, True),
        (129, torch.float16, False),
        (1, torch.float32, False),
    ):
        x, _, ids = step(tokens)
        assert grouped.prefers(x.to(dtype), ids) == preferred
