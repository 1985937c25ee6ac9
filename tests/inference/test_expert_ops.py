"""Grouped products of experts: the operators on the CPU, and their CUDA launches on the CPU emulator, against a loop."""

import ctypes
import dataclasses
import types

import pytest
import torch
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.planes import NestedPlanes
from matquant.inference import cuda_experts, expert_reference
from matquant.inference.expert_ops import StackedExperts, route
from matquant.inference.expert_reference import GroupedCall
from matquant.inference.moe_launch import BLOCK_M, choose_block_m, expert_mask, max_items, prefers_grouped
from tests.kernels.emulator import compile_kernel, have_compiler, read_source

compiler = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of 3 multiprocessors that the CPU emulator implements. Returns the kernels and grids of its launches."""
    launched = []

    class Launcher:
        def __init__(self, source, name, defines):
            self.name, self.kernel = name, compile_kernel(read_source(source), name, defines)

        def launch(self, grid, block, args, shared_bytes):
            launched.append((self.name, grid))
            grid = grid if isinstance(grid, tuple) else (grid,)
            values = [(ctypes.c_char * len(a)).from_buffer_copy(a) if isinstance(a, bytes) else a for a in args]
            self.kernel.launch(grid, (block,), values, shared_bytes, seed=len(launched))

    properties = types.SimpleNamespace(multi_processor_count=3, shared_memory_per_multiprocessor=100 * 1024)
    monkeypatch.setattr(
        cuda_experts, "load", lambda source, name, *, defines, device, **how: Launcher(source, name, defines)
    )
    monkeypatch.setattr(cuda_experts, "launch_cache", {})
    monkeypatch.setattr(cuda_experts, "route_cache", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    return launched


def stack(weights, parts, **changes):
    """Matrices of all experts, expert by expert, as one."""
    packed = [NestedPlanes.pack(weight) for weight in weights]
    bits = packed[0].format.scale_bits

    def join(tensors):
        return None if tensors[0] is None else torch.cat(tensors, 1)

    fields = {
        "planes": join([one.planes for one in packed]),
        "scales": [join([one.scales for one in packed]), *(join([one.own_scales[b] for one in packed]) for b in bits)],
        "scale_bits": bits,
        "zeros": join([one.zeros for one in packed]),
        "out_features": [weight.codes.shape[0] for weight in weights[:parts]],
        "in_features": weights[0].codes.shape[1],
        "format": packed[0].format,
    }
    return StackedExperts(**(fields | changes))


def make_experts(count, rows=(64,), columns=256, group_size=64, **about):
    """Weights expert by expert, of so many rows."""
    sizes = [size for _ in range(count) for size in rows]
    return [make_weight(size, columns, group_size, seed=i, **about) for i, size in enumerate(sizes)]


def activations(*shape, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(2)) + 0.3).to(dtype)


def ids_of(tokens, top_k, experts, seed=0):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(top_k).indices


def exact(x, ids, held, weights, parts, bits):
    """Products in float64: [pairs, rows of an expert]."""
    per_row = ids.numel() // len(x)
    y = torch.zeros(ids.numel(), sum(weight.codes.shape[0] for weight in weights[:parts]), dtype=torch.float64)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert in held:
            own = range(held.index(expert) * parts, (held.index(expert) + 1) * parts)
            y[pair] = torch.cat([weights[i].dequantize(bits[i]).double() @ x[pair // per_row].double() for i in own])
    return y


def on_emulator(stacked, x, ids, held, total, bits):
    """The CUDA operators on the emulated device."""
    block_m = choose_block_m(*ids.shape, total)
    pairs, items = cuda_experts.route(ids, held, block_m)
    call = GroupedCall(
        x,
        pairs,
        items,
        stacked.planes,
        stacked.scales,
        stacked.scale_bits,
        stacked.zeros,
        bits,
        stacked.out_features,
        stacked.in_features,
        block_m,
        *stacked.format.op_args,
    )
    return cuda_experts.grouped_linear(call)


def assert_close(y, wanted, dtype):
    rounding = (wanted.to(dtype).double() - wanted).norm()
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    assert (y.double() - wanted).norm() <= 1.2 * rounding


CASES = [
    ({}, (64,), [4]),
    ({}, (64,), [2, 4, 8]),
    ({"scale_bits": (2, 4)}, (64, 64), [2, 2, 4, 4, 3, 3]),
    ({"scale_bits": (2,)}, (64, 128), [2, 4, 4, 2, 3]),
    ({"zeros": True, "master_bits": 6}, (128,), [3, 6]),
    ({"slicing": "round", "offset": 0.0}, (64,), [2, 5]),
    ({"stretch": 1.25, "group_size": 32}, (64,), [8, 6, 3]),
    ({"dtype": torch.bfloat16, "columns": 200}, (64, 64), [5, 7]),
]


@compiler
@pytest.mark.parametrize(("about", "rows", "widths"), CASES)
def test_every_expert_reads_its_own_bit_width(device, about, rows, widths):
    """On the CPU and by the kernels; each set of scales, ranges of rows at different bit-widths, experts elsewhere."""
    weights = make_experts(4, rows, **about)
    stacked, parts = stack(weights, len(rows)), len(rows)
    bits = [widths[i % len(widths)] for i in range(len(weights))]
    dtype = about.get("dtype", torch.float16)
    held, total = (1, 2, 4, 5), 6
    for seed, tokens in enumerate((1, 5)):
        ids = ids_of(tokens, 3, total, seed)
        for count in (tokens, ids.numel()):  # a row of x for each token, and for each pair
            x = activations(count, stacked.in_features, dtype=dtype)
            wanted = exact(x, ids, held, weights, parts, bits)
            for y in (
                stacked.linear(x, route(ids, held, total), bits),
                on_emulator(stacked, x, ids, held, total, bits),
            ):
                assert_close(y, wanted, dtype)


@compiler
def test_a_launch_for_each_bit_width_and_range_of_rows(device):
    stacked = stack(make_experts(4, (64, 64)), 2)
    x, ids = activations(3, 256), ids_of(3, 2, 4)
    for bits, launches in (
        ([4] * 8, [(2, 4)]),
        ([4, 4, 2, 2, 4, 4, 8, 8], [(2, 4)] * 3),
        ([4, 2] * 4, [(1, 4)] * 2),
        ([4, 2, 4, 4, 4, 2, 4, 4], [(1, 4)] * 3),
    ):
        device.clear()
        on_emulator(stacked, x, ids, range(4), 4, bits)
        assert device == [("moe_route", 1), *(("nested_moe_gemm", grid) for grid in launches)]


@compiler
@pytest.mark.parametrize("block_m", BLOCK_M)
def test_routings_of_both_implementations_are_equal(device, block_m):
    for tokens, experts in ((1, 4), (50, 8), (64, 40)):
        ids = ids_of(tokens, 2, experts)
        for held in (range(experts), range(1, experts, 2)):
            count = sum(one in held for one in ids.flatten().tolist())
            for one, other in zip(
                expert_reference.route(ids, held, block_m), cuda_experts.route(ids, tuple(held), block_m), strict=True
            ):
                length = count if one.ndim == 1 else len(one)
                assert torch.equal(one[:length], other[:length])


@compiler
def test_no_tokens(device):
    stacked = stack(make_experts(2), 1)
    ids, x = torch.zeros(0, 2, dtype=torch.int64), activations(0, 256)
    for y in (stacked.linear(x, route(ids, range(2), 2), [4, 4]), on_emulator(stacked, x, ids, range(2), 2, [4, 4])):
        assert y.shape == (0, 64)


@compiler
def test_formats_without_a_kernel_are_computed_by_torch(device, caplog):
    weights = make_experts(2, group_size=48, columns=96)
    stacked, ids = stack(weights, 1), ids_of(4, 1, 2)
    for dtype in (torch.float16, torch.float32):
        assert not stacked.is_supported(dtype)
        x = activations(4, 96, dtype=dtype)
        y = on_emulator(stacked, x, ids, (0, 1), 2, [3, 8])
        torch.testing.assert_close(y.double(), exact(x, ids, (0, 1), weights, 1, [3, 8]), rtol=1e-2, atol=1e-2)
    assert "computed by torch, slowly" in caplog.text


@compiler
def test_kernels_are_not_loaded_during_a_capture(device, monkeypatch):
    stacked, ids, x = stack(make_experts(2), 1), ids_of(2, 1, 2), activations(2, 256)
    on_emulator(stacked, x, ids, range(2), 2, [4, 4])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_emulator(stacked, x, ids, range(2), 2, [4, 4])
    for bits in ([4, 2], [2, 2]):
        with pytest.raises(UserError, match="Run the model once at these bits"):
            on_emulator(stacked, x, ids, range(2), 2, bits)
    with pytest.raises(UserError, match="Run the model once at these bits"):
        cuda_experts.route(ids.int(), (0, 1), 8)


def bad_call(**changes):
    stacked = stack(make_experts(2, (64, 64)), 2)
    routing = expert_reference.route(ids_of(3, 2, 2), (0, 1), 8)
    fields = {"x": activations(3, 256), "pairs": routing[0], "items": routing[1], "bits": [4] * 4, "block_m": 8}
    of_stack = {field.name: getattr(stacked, field.name) for field in dataclasses.fields(stacked)}
    of_stack.pop("format")
    names = ("group_size", "master_bits", "slicing", "offset", "stretch")
    fields |= of_stack | dict(zip(names, stacked.format.op_args, strict=True))
    return [(fields | changes)[name] for name in GroupedCall._fields]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 128).half()}, r"x must be \[..., 256\]"),
        ({"x": torch.zeros(4, 256).half()}, r"for 6 pairs; found \[4, 256\]"),
        ({"bits": [4] * 3}, "number for each of the 2 matrices"),
        ({"bits": [4, 4, 9, 4]}, "9"),
        ({"out_features": [64, 60]}, "multiples of 64"),
        ({"out_features": [64, 128]}, "must be contiguous int32"),
        ({"block_m": 9}, "block_m must be one of 8, 16, 32, 64"),
        ({"pairs": torch.zeros(6)}, "pairs must be that of route_experts"),
        ({"items": torch.zeros(6, 3, dtype=torch.int32)}, "items must be that of route_experts"),
        ({"scale_bits": [2]}, "1 sets of scales"),
    ],
)
def test_bad_arguments_are_refused(device, changes, message):
    with pytest.raises(UserError, match=message):
        torch.ops.matquant.nested_grouped_linear(*bad_call(**changes))
    with pytest.raises(UserError, match=message):
        cuda_experts.grouped_linear(GroupedCall(*bad_call(**changes)))


@pytest.mark.parametrize(
    ("experts", "held", "message"),
    [
        (torch.zeros(2, 2), [0], "must be int32 or int64"),
        (torch.zeros(2, dtype=torch.int64), [0], r"must be int32 or int64 \[tokens, k\]"),
        (torch.zeros(2, 2, dtype=torch.int64), [1, 0], "ascending"),
        (torch.zeros(2, 2, dtype=torch.int64), [0, 1024], r"0\.\.1023"),
        (torch.zeros(2, 2, dtype=torch.int64), [], "ascending"),
    ],
)
def test_bad_routings_are_refused(device, experts, held, message):
    for implementation in (torch.ops.matquant.route_experts, cuda_experts.route):
        with pytest.raises(UserError, match=message):
            implementation(experts, held, 8)


def test_gradients_are_not_lost_silently(device):
    arguments = bad_call(x=activations(3, 256).requires_grad_())
    with pytest.raises(UserError, match="records no gradient"):
        torch.ops.matquant.nested_grouped_linear(*arguments)


def test_operators_are_sound():
    """Shapes without data, schemas, and no hidden writes."""
    arguments = bad_call()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.matquant.nested_grouped_linear.default, arguments, test_utils=tests)
    ids = ids_of(3, 2, 2)
    torch.library.opcheck(torch.ops.matquant.route_experts.default, (ids, [0, 1], 8), test_utils=tests)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block_m"),
    [(1, 2, 8, 8), (16, 2, 8, 8), (32, 2, 8, 16), (64, 2, 8, 32), (256, 2, 8, 64), (64, 8, 128, 8), (512, 8, 128, 64)],
)
def test_block_m_is_twice_the_mean(tokens, top_k, experts, block_m):
    assert choose_block_m(tokens, top_k, experts) == block_m
    assert prefers_grouped(tokens, top_k, experts) == (tokens * top_k <= 64 * experts)


def test_masks_hold_the_ids_of_experts():
    words = torch.frombuffer(bytearray(expert_mask([0, 33, 1023])), dtype=torch.int32).tolist()
    assert (words[0], words[1], words[31]) == (1, 2, -(2**31))
    assert not any(words[2:31])
    with pytest.raises(UserError, match="found 1024"):
        expert_mask([1024])


@pytest.mark.parametrize(("pairs", "experts", "items"), [(0, 3, 0), (3, 8, 3), (8, 8, 8), (24, 8, 10), (17, 1, 3)])
def test_bound_of_items(pairs, experts, items):
    assert max_items(pairs, experts, 8) == items
