"""CUDA operators on a GPU. Skipped without an NVIDIA GPU and CuPy."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from weights import make_weight

from matquant.calibration import hessian
from matquant.cuda import Kernel
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.inference import NestedLinear, NestedPlanes, ops, set_bits
from matquant.inference.gemm_shape import GemmShape
from matquant.inference.model_surgery import fuse_layers
from matquant.models.activation_cache import ActivationCache
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None, reason="no NVIDIA GPU, or no CuPy"
    ),
]
TINY = Path(__file__).parent.parent / "experiments" / "models" / "tiny"


def activations(*shape, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) + 0.3).to("cuda", dtype)


def times_rounding(made, exact, dtype):
    return ((made.double() - exact).norm() / (exact.to(dtype).double() - exact).norm()).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("columns", [4096, 8192])
def test_clusters_are_as_good_as_rounding(bits, columns):
    """Matrices whose CTAs fill a wave of this device, with a ragged last tile, eager and in a graph.

    The bound is that of rounding the exact result, and from 17 tokens on of a matrix whose weights are rounded.
    """
    from matquant.inference.cuda_ops import device_limits
    from matquant.inference.kernel_families import choose_tile_config

    device, used = device_limits(0), set()
    for wave in (0.5, 0.72, 1.0, 1.68):
        rows = int(wave * device.multiprocessors) * 64 - 20
        weight = make_weight(rows, columns, 128, offset=8.0, stretch=1.25)
        packed = NestedPlanes.pack(weight).to("cuda")
        dense, rounded = (weight.dequantize(bits, dtype).cuda().double() for dtype in (torch.float32, torch.float16))
        for tokens in (1, 5, 8, 16, 32, 64, 100, 256):
            shape = GemmShape(
                tokens=tokens, rows=rows, depth=columns, bits=bits, format=packed.format, dtype=torch.float16
            )
            used.add(choose_tile_config(shape, device).cluster)
            x = activations(tokens, columns)
            made, exact = ops.linear(x, packed, bits), x.double() @ dense.T
            best = (x.double() @ (dense if tokens <= 16 else rounded).T).half().double()
            assert (made.double() - exact).norm() <= 1.2 * (best - exact).norm()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = ops.linear(x, packed, bits)
            graph.replay()
            assert torch.equal(captured, made)
    assert not device.clusters or max(used) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_up_to_64_tokens_are_as_good_as_rounding_the_exact_result(bits, dtype):
    """By mma.sync, and by wgmma where there is one."""
    weight = make_weight(200, 1024, 128, offset=8.0, dtype=dtype)
    packed = NestedPlanes.pack(weight).to("cuda")
    for tokens in (1, 2, 5, 13, 17, 48, 64):
        x = activations(tokens, 1024, dtype=dtype)
        exact = x.double() @ weight.dequantize(bits).double().T.cuda()
        assert times_rounding(ops.linear(x, packed, bits), exact, dtype) <= 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_up_to_512_tokens_are_as_good_as_by_a_dense_matrix(bits, dtype):
    """By gemm_sm90_ws.cu where there is wgmma."""
    for rows, zeros, scales in ((200, True, torch.float16), (1100, False, torch.bfloat16)):
        weight = make_weight(rows, 1088, 64, zeros=zeros, offset=0.0 if zeros else 8.0, dtype=scales)
        packed = NestedPlanes.pack(weight).to("cuda")
        for tokens in (65, 130, 256, 301, 512):
            x = activations(tokens, 1088, dtype=dtype)
            exact = x.double() @ weight.dequantize(bits).double().T.cuda()
            by_dense = (x.double() @ weight.dequantize(bits, dtype).double().T.cuda()).to(dtype)
            made = ops.linear(x, packed, bits)
            assert (made.double() - exact).norm() <= 1.2 * (by_dense.double() - exact).norm()


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_many_tokens_are_multiplied_with_the_rounded_weight(bits):
    weight = make_weight(4100, 1024, 128, offset=8.0)
    packed = NestedPlanes.pack(weight).to("cuda")
    x, bias = activations(1200, 1024), activations(4100)
    exact = x.double() @ weight.dequantize(bits, torch.float16).double().T.cuda() + bias.double()
    # The bias is added to a rounded product: twice the error of rounding at most.
    assert times_rounding(ops.linear(x, packed, bits, bias), exact, torch.float16) <= 2


@pytest.mark.parametrize("about", [{}, {"zeros": True}, {"slicing": "round"}, {"master_bits": 6}, {"group_size": 32}])
def test_packing_and_decoding_are_those_of_the_cpu(about):
    weight = make_weight(**({"rows": 130, "columns": 512, "group_size": 128} | about))
    packed, there = NestedPlanes.pack(weight), NestedPlanes.pack(weight.to("cuda"))
    assert torch.equal(packed.planes, there.planes.cpu())
    assert torch.equal(packed.scales, there.scales.cpu())
    for bits in range(2, weight.format.master_bits + 1):
        assert torch.equal(ops.dequantize(there, bits, torch.float16).cpu(), weight.dequantize(bits, torch.float16))


# Rows whose last group is shorter: columns, group size.
SHORT_LAST_GROUPS = [(576, 128), (576, 32), (200, 128), (200, 200), (72, 64), (81, 32), (30, 30)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), SHORT_LAST_GROUPS)
def test_a_short_last_group_is_multiplied_by_every_kernel(columns, group_size, zeros):
    """By mma.sync for few tokens, wgmma where there is one, and strips of the dense weight for many."""
    weight = make_weight(1100, columns, group_size, zeros=zeros, offset=8.0)
    packed = NestedPlanes.pack(weight).to("cuda")
    for bits in (2, 3, 5, 8):
        assert torch.equal(ops.dequantize(packed, bits, torch.float16).cpu(), weight.dequantize(bits, torch.float16))
        exact_weight, dense = (
            weight.dequantize(bits, dtype).double().T.cuda() for dtype in (torch.float32, torch.float16)
        )
        for tokens in (1, 5, 13, 17, 48, 64, 65, 130, 512, 1200):
            x = activations(tokens, columns)
            exact = x.double() @ exact_weight
            best = (exact if tokens <= 64 else x.double() @ dense).half()
            made = ops.linear(x, packed, bits)
            assert (made.double() - exact).norm() <= 1.2 * (best.double() - exact).norm()


@pytest.mark.parametrize(("columns", "group_size"), [(576, 128), (200, 128), (200, -1), (72, 64), (30, 128)])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_short_last_group_is_solved_as_on_the_cpu(columns, group_size, act_order):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(130, columns, generator=generator) * 0.05
    inputs = torch.randn(3 * columns, columns, generator=generator)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    lambdas = {2: 1.0, 4: 4.0, 8: 64.0}
    options = SolverOptions(
        lambdas=lambdas, group_size=group_size, zero_point_offset=8.0, cd_passes=1, act_order=act_order
    )
    there, here = (
        solve(weight.to(device), prepare_hessians([HessianStats(hessian=hessian.to(device))], options), options).to(
            "cpu"
        )
        for device in ("cuda", "cpu")
    )
    assert there.format == here.format
    assert there.scales.shape == here.scales.shape == (130, -(-columns // here.format.group_size))
    torch.testing.assert_close(there.scales[:, :1], here.scales[:, :1])
    # Sums in another order change a few choices, and one other choice changes the rest of its row.
    for bits in lambdas:
        errors = [relative_error(weight, one.dequantize(bits), hessian) for one in (there, here)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_gradients_are_those_of_the_dense_weight(tokens, dtype):
    weight = make_weight(512, 1024, 128, dtype=dtype)
    packed = NestedPlanes.pack(weight).to("cuda")
    for bits in (2, 8):
        x, outer = activations(tokens, 1024, dtype=dtype).requires_grad_(), activations(tokens, 512, dtype=dtype)
        bias = activations(512, dtype=dtype).requires_grad_()
        ops.linear(x, packed, bits, bias).backward(outer)
        exact = outer.double() @ weight.dequantize(bits).double().cuda()
        assert (x.grad.double() - exact).norm() <= 0.01 * exact.norm()
        torch.testing.assert_close(bias.grad, outer.float().sum(0).to(dtype))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_inputs_lose_nothing(dtype, monkeypatch):
    monkeypatch.setattr(hessian, "PANEL_COLUMNS", 192)
    moments = hessian.HessianAccumulator(512, "cuda", asymmetric=True)
    batches = [activations(4, 600, 512, dtype=dtype) * (1 + k) for k in range(3)]
    for full, _, inputs, _ in batches:
        moments.update(inputs, full)
    inputs = torch.cat([batch[2] for batch in batches]).double()
    full = torch.cat([batch[0] for batch in batches]).double()
    square, cross = (2 * left.T @ inputs / len(inputs) for left in (inputs, full - inputs))
    assert (moments.hessian - square).norm() <= 1e-5 * square.norm()
    assert (moments.cross - cross).norm() <= torch.finfo(dtype).eps * cross.norm()


def test_hidden_states_in_the_hosts_memory_are_copied_in_order():
    device = torch.device("cuda")
    states = ActivationCache((64, 256, 512), torch.float16, torch.device("cpu"), device)
    values = activations(64, 256, 512)
    states[0:64] = values
    copied = states.clone()
    for start in range(0, 64, 16):
        rows = slice(start, start + 16)
        for _ in range(5):
            states[rows] = states[rows] + 1
    exact = values
    for _ in range(5):
        exact = exact + 1
    assert torch.equal(states[0:64], exact)
    assert torch.equal(copied[0:64], values)


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


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_captured_passes_of_a_refinement_give_the_gradients_of_eager_ones(kind, tmp_path):
    from architectures import make_model, save
    from packing import Opened

    from matquant.refine.block_passes import BlockPasses, GraphedPasses
    from matquant.refine.slice_model import open_slice_model

    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store")
    weights = {n: w for i in range(len(opened.parent.blocks)) for n, w in opened.parent.block(i).items()}
    windows = torch.randint(3, 120, (6, 12), generator=torch.Generator().manual_seed(0))
    with open_slice_model(opened.blocks, weights, windows, 2, torch.device("cuda"), torch.float32) as model:
        graphed = None
        for factor, batch in ((1.0, 0), (1.2, 1), (0.9, 2)):
            scales = {n: (w.scales.float() * factor).requires_grad_() for n, w in model.reader.weights.items()}
            hidden = model.inputs.hidden[model.inputs.rows[batch]]
            eager = BlockPasses(model.reader, 3, model.inputs.kwargs[batch])
            captured = BlockPasses(model.reader, 3, model.inputs.kwargs[batch])
            graphed = graphed or GraphedPasses(captured, hidden, scales, torch.cuda.graph_pool_handle())
            output, expected = graphed.forward(hidden, scales).clone(), eager.forward(hidden, scales)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            gradient = torch.randn_like(output)
            found, gradients = graphed.backward(gradient), eager.backward(gradient)
            assert found.keys() == gradients.keys()
            for name, one in gradients.items():
                torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_captured_passes_of_trained_codes_move_them_like_eager_ones(kind, tmp_path):
    from architectures import make_model, save
    from packing import Opened

    from matquant.refine.code_refinement import CodeRefinement
    from matquant.refine.config import RefineConfig
    from matquant.refine.refinement import RefineContext
    from matquant.refine.slice_model import open_slice_model

    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store", stretch=1.25)
    weights = {n: w for i in range(len(opened.parent.blocks)) for n, w in opened.parent.block(i).items()}
    windows = torch.randint(3, 120, (6, 12), generator=torch.Generator().manual_seed(0))
    device, found = torch.device("cuda"), {}
    config = RefineConfig(method="codes", held_bits=(6, 8), steps=3, code_learning_rate=0.3, warmup_steps=0)
    for graphs in (True, False):
        fields = {"blocks": opened.blocks, "parent": opened.parent, "windows": windows, "validation": windows}
        refinement = CodeRefinement(config, RefineContext(**fields, batch_size=2, device=device, dtype=torch.float32))
        with open_slice_model(
            opened.blocks, weights, windows, 2, device, torch.float32, refinement.linear, graphs
        ) as model:
            refinement.start(model)
            refinement.validated(dict.fromkeys((2, 3, 4, 6, 8), 0.1))
            for batch in range(3):
                refinement.take_step(model, batch)
            assert not model.graphs_refused
        found[graphs] = {name: codes.momentum.float() for name, codes in refinement._codes.items()}
    for name, one in found[False].items():
        torch.testing.assert_close(found[True][name], one, rtol=0.02, atol=0.02 * float(one.abs().max()))
        assert one.any()


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
    monkeypatch.syspath_prepend(Path(__file__).parent / "vllm_plugin")
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
