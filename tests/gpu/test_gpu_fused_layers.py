"""Fused layers on a GPU. Skipped without an NVIDIA GPU and CuPy."""

import copy

import pytest
import torch
from on_gpu import NEEDS_GPU, activations, times_rounding
from torch import nn
from weights import make_weight

from matquant.cuda import Kernel
from matquant.inference import NestedLinear, set_bits
from matquant.inference.model_surgery import fuse_layers

pytestmark = NEEDS_GPU


class Attention(nn.Module):
    """Three layers with one input, as in a model of Transformers."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
            bias = torch.randn(len(weight.codes), generator=torch.Generator().manual_seed(len(weight.codes))).half()
            self.add_module(name, NestedLinear.from_planes(weight, bias))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.fixture
def kernel_launches(monkeypatch):
    """Names of the kernels that were launched so far."""
    found, launch = [], Kernel.launch
    monkeypatch.setattr(Kernel, "launch", lambda self, *args: found.append(self) or launch(self, *args))
    return found


def make_attention(**options):
    weights = [make_weight(rows, 1024, 128, seed=rows, **options) for rows in (512, 200, 128)]
    attention = Attention(weights)
    fuse_layers(attention)
    return attention.cuda(), weights


@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"stretch": 1.25, "scale_bits": (2, 3)}])
@pytest.mark.parametrize("bits", [(8, 8, 8), (2, 2, 2), (3, 3, 4), (4, 2, 8)])
def test_fused_layers_take_one_launch_for_neighbours_of_equal_width(bits, options, kernel_launches):
    attention, weights = make_attention(**options)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer, width in zip(layers, bits, strict=True):
        layer.bits = width
    for tokens in (1, 3, 16, 64):
        x = activations(tokens, 1024)
        attention(x)
        kernel_launches.clear()
        for y, layer, weight, width in zip(attention(x), layers, weights, bits, strict=True):
            exact = x.double() @ weight.dequantize(width).double().T.cuda() + layer.bias.double()
            assert times_rounding(y, exact, torch.float16) <= 1.2
        assert len(kernel_launches) == len(set(bits))
    kernel_launches.clear()
    attention(activations(65, 1024))
    assert len(kernel_launches) == 3


@pytest.mark.parametrize("tokens", [1, 16])
def test_fused_layers_in_a_graph_give_the_outputs_of_eager_calls(tokens, kernel_launches):
    attention, _ = make_attention()
    x = activations(tokens, 1024)
    for bits in (4, 2):
        set_bits(attention, bits)
        attention(x)
        kernel_launches.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(x)
        assert len(kernel_launches) == 1
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            for found, wanted in zip(captured, attention(x), strict=True):
                assert torch.equal(found, wanted)


def test_outputs_of_another_stream_are_not_taken(kernel_launches):
    attention, weights = make_attention()
    x = activations(4, 1024)
    attention(x)
    kernel_launches.clear()
    attention.q_proj(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = attention.k_proj(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert len(kernel_launches) == 2
    exact = x.double() @ weights[1].dequantize(8).double().T.cuda() + attention.k_proj.bias.double()
    assert times_rounding(y, exact, torch.float16) <= 1.2


def test_fused_layers_move_between_devices_and_free_their_memory():
    attention, _ = make_attention()
    x = activations(2, 1024)
    wanted, before = attention(x), torch.cuda.memory_allocated()
    attention.cpu()
    assert not attention.q_proj.fused.is_packed
    assert torch.cuda.memory_allocated() <= before - attention.q_proj.planes.nbytes
    attention.cuda()
    assert attention.q_proj.fused.is_packed
    assert torch.cuda.memory_allocated() <= before
    for one, other in zip(attention(x), wanted, strict=True):
        assert torch.equal(one, other)
    attention.k_proj.cpu()
    torch.testing.assert_close(attention.q_proj(x), wanted[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_fused_layers_of_a_model_generate_the_tokens_of_separate_ones(kind, kernel_launches):
    from architectures import make_model
    from nesting import nest

    separate = nest(make_model(kind)).half().cuda()
    fused = copy.deepcopy(separate)
    assert fuse_layers(fused)
    prompts = (torch.arange(24).view(3, 8) * 7 % 100 + 2).cuda()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    for bits in (8, 3):
        found, counts = [], []
        for model in (separate, fused):
            set_bits(model, bits)
            kernel_launches.clear()
            found.append(torch.stack(model.generate(prompts, **settings).logits[:1]).float())
            counts.append(len(kernel_launches))
        torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
        assert counts[1] < counts[0]
