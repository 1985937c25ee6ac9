"""Nested experts on a GPU: grouped products, routing, models, and vLLM's layer. Skipped without an NVIDIA GPU and CuPy."""

from pathlib import Path

import pytest
import torch
from on_gpu import NEEDS_GPU, activations, times_rounding
from torch import nn
from weights import make_weight

from matquant.inference import NestedPlanes, set_bits

pytestmark = NEEDS_GPU


def stack_experts(weights):
    from matquant.inference.expert_ops import StackedExperts

    packed = [NestedPlanes.pack(weight).to("cuda") for weight in weights]
    zeros = None if packed[0].zeros is None else torch.cat([one.zeros for one in packed], 1)
    return StackedExperts(
        planes=torch.cat([one.planes for one in packed], 1),
        scales=[torch.cat([one.scales for one in packed], 1)],
        scale_bits=[],
        zeros=zeros,
        out_features=[packed[0].out_features],
        in_features=packed[0].in_features,
        format=packed[0].format,
    )


def routed(tokens, top_k, experts, seed=0):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(top_k).indices.cuda()


def exact_products(x, ids, held, weights, bits):
    exact = torch.zeros(ids.numel(), weights[0].codes.shape[0], dtype=torch.float64, device="cuda")
    for place, expert in enumerate(held):
        pairs = (ids.flatten() == expert).nonzero()[:, 0]
        rows = x[pairs // (ids.numel() // len(x))].double()
        exact[pairs] = rows @ weights[place].dequantize(bits[place]).double().T.cuda()
    return exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("about", "columns", "group_size"),
    [
        ({}, 1024, 128),
        ({"zeros": True}, 512, 32),
        ({"slicing": "round", "offset": 0.0}, 576, 128),
        ({"stretch": 1.25}, 768, 64),
        ({"master_bits": 6, "offset": 2.0}, 200, 200),
    ],
)
def test_grouped_products_of_experts_are_as_good_as_rounding(about, columns, group_size, dtype):
    """A bit-width of its own for each expert, every number of pairs in a CTA, experts without tokens or elsewhere."""
    from matquant.inference.expert_ops import route

    held, total = (0, 2, 3, 4, 7), 8
    weights = [make_weight(192, columns, group_size, seed=one, dtype=dtype, **about) for one in held]
    stacked, top = stack_experts(weights), about.get("master_bits", 8)
    for tokens in (1, 5, 16, 40, 130, 400):  # CTAs of 8, 8, 8, 32, 64 and 64 pairs
        bits = [2 + (one + tokens) % (top - 1) for one in held]
        ids = routed(tokens, 2, total, seed=tokens)
        for rows, kind in ((tokens, torch.int64), (2 * tokens, torch.int32)):
            x = activations(rows, columns, dtype=dtype)
            made = stacked.linear(x, route(ids.to(kind), held, total), bits)
            assert times_rounding(made, exact_products(x, ids, held, weights, bits), dtype) <= 1.2


def test_routing_is_that_of_the_cpu():
    for tokens, top_k, experts in ((1, 2, 8), (33, 8, 128), (700, 4, 60), (2000, 8, 256)):
        ids = routed(tokens, top_k, experts)
        for held in (range(experts), range(1, experts, 2)):
            count = sum(one in held for one in ids.flatten().tolist())
            for block_m in (8, 64):
                there, here = (torch.ops.matquant.route_experts(one, list(held), block_m) for one in (ids, ids.cpu()))
                assert torch.equal(there[0][:count].cpu(), here[0][:count])
                assert torch.equal(there[1].cpu(), here[1])


@pytest.mark.parametrize("bits", [[4] * 16, [2, 4, 8, 3] * 4])
def test_a_captured_grouped_product_holds_for_every_routing(bits):
    from matquant.inference.expert_ops import route

    weights = [make_weight(256, 512, 128, seed=one) for one in range(16)]
    stacked, x, ids = stack_experts(weights), activations(6, 512), routed(6, 2, 16)
    compute = lambda: stacked.linear(x, route(ids, range(16), 16), bits)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for seed in range(5):
        ids.copy_(routed(6, 2, 16, seed) if seed else torch.zeros_like(ids))  # also all tokens to one expert
        x.copy_(activations(6 * (seed + 1), 512)[-6:])
        for _ in range(10):
            graph.replay()
        assert torch.equal(captured, compute())
        assert times_rounding(captured, exact_products(x, ids, range(16), weights, bits), torch.float16) <= 1.2


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_a_model_are_computed_together(kind, monkeypatch):
    """Eager, and in a captured step of decoding at two bit-widths; against a loop over experts."""
    from architectures import make_model
    from nesting import nest

    from matquant.inference import experts, nested_layers

    model = nest(make_model(kind)).half().cuda()
    ids = (torch.arange(24).view(3, 8) * 7 % 100 + 2).cuda()
    with torch.no_grad():
        for widths in (8, 3, {name: 2 + i % 7 for i, name in enumerate(nested_layers(model))}):
            set_bits(model, widths)
            with monkeypatch.context() as patch:
                patch.setattr(experts, "uses_kernels", lambda x: False)
                expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0.02, atol=0.02)
        block = next(one for one in model.modules() if isinstance(one, experts.PerExpertLinears))
        x, weights, choices = activations(4, 64), activations(4, 2), routed(4, 2, len(block))
        for bits in (4, 2):
            set_bits(model, bits)
            eager = block(x, choices, weights)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = block(x, choices, weights)
            graph.replay()
            assert torch.equal(captured, eager)
            choices.copy_(routed(4, 2, len(block), seed=bits))
            graph.replay()
            assert torch.equal(captured, block(x, choices, weights))
            assert not torch.equal(captured, eager)


def test_experts_that_have_not_run_are_not_captured():
    from architectures import make_model
    from nesting import nest

    from matquant.errors import UserError
    from matquant.inference import experts

    model = nest(make_model("mixtral")).half().cuda()
    block = next(one for one in model.modules() if isinstance(one, experts.PerExpertLinears))
    x, weights, choices = activations(4, 64), activations(4, 2), routed(4, 2, len(block))
    with (
        torch.no_grad(),
        pytest.raises(UserError, match="Run the model once"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        block(x, choices, weights)


def test_experts_of_vllm_in_a_graph(monkeypatch):
    """Planes may move to host memory between captures."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "vllm_plugin")
    from test_vllm_experts import Layer, step

    layer = Layer()
    for member in layer.all_members():
        member.to("cuda")
        member.step_bits = member.step_bits.cpu()
    grouped = layer.group()
    x, weights, ids = (one.cuda() for one in step(6))
    for bits, kept in ((8, 8), (3, 3), (2, 3), (8, 8)):
        for member in layer.all_members():
            member.memory.keep(kept)
            member.set_bits(bits, bits)
        eager = grouped(x, weights, ids, nn.functional.silu)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = grouped(x, weights, ids, nn.functional.silu)
        graph.replay()
        assert torch.equal(captured, eager)
        expected = layer.expected(x.cpu(), weights.cpu(), ids.cpu())
        assert (captured.cpu().double() - expected).norm() <= 0.02 * expected.norm()
