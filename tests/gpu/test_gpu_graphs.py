"""CUDA graphs, torch.compile, calls without the dispatcher, and models on a GPU. Skipped without an NVIDIA GPU and CuPy."""

import copy
import threading

import pytest
import torch
from on_gpu import NEEDS_GPU, TINY, activations, times_rounding
from torch import nn
from weights import make_weight

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.inference import NestedLinear, NestedPlanes, ops, set_bits

pytestmark = NEEDS_GPU


def test_a_layer_that_was_just_packed_is_read_whole():
    """Launches overlap with the kernel in front of them; they must still see what it wrote."""
    weights = [make_weight(512, 1024, 128, seed=seed).to("cuda") for seed in range(4)]
    x = activations(1, 1024)
    for _ in range(25):
        for weight in weights:
            packed = NestedPlanes.pack(weight)
            made = ops.linear(x, packed, 3)
            exact = x.double() @ weight.dequantize(3).double().T
            assert times_rounding(made, exact, torch.float16) <= 1.2


@pytest.mark.parametrize("tokens", [4, 100])
def test_a_chain_of_layers_is_the_same_in_a_graph(tokens):
    """Every layer reads what the one in front has just written."""
    layers = nn.Sequential(
        *(
            NestedLinear.from_planes(NestedPlanes.pack(make_weight(1024, 1024, 128, seed=s)).to("cuda"))
            for s in range(6)
        )
    )
    for layer in layers:
        layer.scales *= 0.1
    x = activations(tokens, 1024)
    set_bits(layers, 3)
    eager = layers(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layers(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers(x)
    set_bits(layers, 8)  # moves nothing: the graph stays valid, at its width
    other = layers(x)
    for _ in range(50):
        graph.replay()
    assert torch.equal(captured, eager)
    assert not torch.equal(captured, other)
    x.copy_(activations(2 * tokens, 1024)[tokens:])
    graph.replay()
    set_bits(layers, 3)
    assert torch.equal(captured, layers(x))


@pytest.mark.parametrize("tokens", [1, 32, 128])
@pytest.mark.parametrize("options", [{}, {"zeros": True}], ids=str)
def test_calls_without_the_dispatcher_give_what_the_operator_gives(tokens, options):
    """A profiler sees the operator; other calls leave the dispatcher out."""
    weights = [make_weight(512, 1024, 128, seed=seed, **options) for seed in range(2)]
    layer, x = NestedLinear.from_planes(weights[0], activations(512).cpu()).cuda(), activations(tokens, 1024)
    for weight in (*weights, weights[0]):
        layer.load_state_dict(NestedLinear.from_planes(weight, layer.bias.cpu()).state_dict(), assign=True)
        layer.cpu().cuda()
        for bits in (4, 8):
            layer.bits = bits
            direct = [layer(x) for _ in range(3)]
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                by_operator = layer(x)
            assert "matquant::nested_linear" in [event.key for event in profile.key_averages()]
            assert all(torch.equal(one, by_operator) for one in direct)
            exact = x.double() @ weight.dequantize(bits).double().T.cuda() + layer.bias.double()
            assert times_rounding(direct[0], exact, torch.float16) <= (1.2 if tokens == 1 else 2)


def test_prepared_launches_run_on_the_current_stream_of_each_thread():
    """The activations are written on the same stream after a long wait: a launch on another stream would read zeros."""
    layer = NestedLinear.from_planes(make_weight(512, 1024, 128).to("cuda"), bits=3)
    source = activations(2, 1024)
    expected, *_ = (layer(source) for _ in range(3))
    products = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                x = torch.zeros_like(source)
                torch.cuda._sleep(2_000_000)
                products.append(layer(x.copy_(source)))
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    work()
    assert len(products) == 9
    assert all(torch.equal(one, expected) for one in products)


def test_compiled_in_one_graph():
    layers = nn.Sequential(
        NestedLinear.from_planes(NestedPlanes.pack(make_weight(256, 512, 128)).to("cuda")),
        nn.GELU(),
        NestedLinear.from_planes(NestedPlanes.pack(make_weight(192, 256, 128)).to("cuda")),
    )
    compiled = torch.compile(layers, fullgraph=True)
    x = activations(2, 3, 512)
    for bits in (8, 3):
        set_bits(layers, bits)
        torch.testing.assert_close(compiled(x), layers(x), rtol=2e-3, atol=2e-3)


def test_a_model_generates_the_same_tokens_as_with_dense_weights():
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float16).cuda()
    nested = copy.deepcopy(dense)
    weights = {}
    for name, layer in dense.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            weights[name] = _rounded(layer.weight.data)
            parent, _, child = name.rpartition(".")
            setattr(
                nested.model.layers.get_submodule(parent),
                child,
                NestedLinear.from_planes(NestedPlanes.pack(weights[name])),
            )
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompt = tokenizer("def __init__(self, ", return_tensors="pt").to("cuda")
    for bits in range(2, 9):
        for name, weight in weights.items():
            dense.model.layers.get_submodule(name).weight.data.copy_(weight.dequantize(bits, torch.float16))
        set_bits(nested, bits)
        expected = dense.generate(**prompt, max_new_tokens=24, do_sample=False)
        assert torch.equal(nested.generate(**prompt, max_new_tokens=24, do_sample=False), expected)


def _rounded(weight):
    """Codes and scales of the nearest 8-bit grid, in groups of 128."""
    rows, columns = weight.shape
    grouped = weight.float().view(rows, columns // 128, 128)
    scales = (grouped.abs().amax(-1) / 127).half()
    codes = (grouped / scales.float()[:, :, None] + 127.5).round().clamp(0, 255).to(torch.uint8)
    return NestedWeight(
        codes=codes.view(rows, columns),
        scales=scales,
        zeros=None,
        format=WeightFormat(
            master_bits=8, slicing="msb", zero_point_offset=0.0, group_size=128, scale_dtype=torch.float16
        ),
    )


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_graphs_of_decoding_read_its_width(kind):
    """``generate`` compiles decoding with a static cache and captures CUDA graphs; mixtures of experts break the graph."""
    from architectures import make_model
    from nesting import nest

    model = nest(make_model(kind)).half().cuda()
    prompts = (torch.arange(24).view(3, 8) * 7 % 100 + 2).cuda()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    logits = {}
    for cache in (None, "static"):
        for bits, prefill in ((2, 8), (2, 2)):
            set_bits(model, bits, prefill=prefill)
            out = model.generate(prompts, cache_implementation=cache, **settings)
            logits[cache, prefill] = torch.stack(out.logits[:2]).float()  # of the prompt, and of the first step
    for prefill in (8, 2):
        torch.testing.assert_close(logits["static", prefill], logits[None, prefill], rtol=0.02, atol=0.02)
    assert (logits[None, 8] - logits[None, 2]).abs().max() > 0.04  # the test could not fail if all widths were alike
