"""CUDA operators on the CPU emulator: launch configurations, arguments, tile semaphores and refused calls."""

import contextlib
import itertools
import logging
import threading
import types

import pytest
import torch
from emulated_device import activations, assert_close
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.nested import WeightFormat
from matquant.inference import NestedLinear, NestedPlanes, cuda_ops, launch_config, torch_reference, workspace
from matquant.inference.fused_layers import FusedLayers
from matquant.inference.gemm_shape import DeviceLimits, GemmShape, folds_zero_point_exactly, is_supported
from matquant.inference.kernel_families import FAMILIES, choose_tile_config
from matquant.inference.launch_config import GEMM_MAX_M, MAX_M, make_launch_config, max_tokens
from tests.kernels.emulator import have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")


def call(x, weight, bits, bias=None):
    packed = NestedPlanes.pack(weight)
    return cuda_ops.linear(
        x,
        packed.planes,
        packed.scales,
        packed.zeros,
        bias,
        bits,
        packed.out_features,
        packed.in_features,
        *packed.format.op_args,
    )


def planned():
    """Number of planned launches."""
    return sum(len(launches) for launches in cuda_ops.launch_cache.values())


@pytest.mark.parametrize(
    ("about", "bits", "tokens"),
    [
        ({"rows": 130, "columns": 512, "group_size": 128}, 3, (1,)),
        ({"rows": 64, "columns": 256, "group_size": 256}, 4, (2, 3)),
        ({"rows": 128, "columns": 384, "group_size": 192}, 2, (13,)),
        ({"rows": 64, "columns": 256, "group_size": 32, "master_bits": 5, "slicing": "round"}, 3, (3,)),
        ({"rows": 64, "columns": 256, "group_size": 32, "master_bits": 5, "slicing": "round"}, 5, (3,)),
        ({"rows": 70, "columns": 256, "group_size": 64, "master_bits": 7, "zeros": True}, 6, (5, 8)),
        ({"rows": 64, "columns": 100, "group_size": 100, "dtype": torch.bfloat16}, 8, (12,)),
        ({"rows": 70, "columns": 256, "group_size": 64, "stretch": 1.25}, 6, (5, 8)),
        ({"rows": 64, "columns": 128, "group_size": 64, "master_bits": 7, "stretch": 1.5}, 7, (3,)),
    ],
)
def test_a_call_reaches_the_kernel_with_what_it_expects(device, about, bits, tokens):
    weight = make_weight(**about)
    dtype = torch.bfloat16 if about.get("dtype") == torch.bfloat16 else torch.float16
    x, bias = activations(*tokens, about["columns"], dtype=dtype), activations(about["rows"], dtype=dtype)
    assert_close(call(x, weight, bits, bias), x, weight, bits, bias)
    assert_close(call(x, weight, bits), x, weight, bits)
    assert len(device) == 2
    assert not cuda_ops.workspaces[x.get_device()].semaphores.any()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_90a"], indirect=True)
@pytest.mark.parametrize(
    ("rows", "bits", "tokens"), [(128, 2, 1), (100, 8, 1), (128, 3, 7), (390, 2, 32), (128, 4, 64)]
)
def test_a_matrix_that_fills_a_wave_reaches_the_kernel_in_clusters(device, monkeypatch, rows, bits, tokens):
    """On a device of 4 multiprocessors, or of 8 for 7 row tiles in clusters of 8."""
    count = 4 if rows <= 128 else 8
    properties = types.SimpleNamespace(multi_processor_count=count, shared_memory_per_multiprocessor=228 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    weight, x, bias = make_weight(rows, 4096, 128, stretch=1.25), activations(tokens, 4096), activations(rows)
    y = call(x, weight, bits, bias)
    assert_close(y, x, weight, bits, bias, rounds_weights=tokens > 16)
    assert torch.equal(call(x, weight, bits, bias), y)
    clusters = {defines["CLUSTER"]: grid for defines, grid in device}
    assert len(clusters) == 1
    assert max(clusters) > 1
    assert clusters[max(clusters)] == count


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("columns", "group_size"), [(30, 30), (72, 72), (72, 64), (200, 128), (200, 32), (576, 128), (81, 64)]
)
def test_a_short_last_group_reaches_the_kernel(device, columns, group_size, zeros):
    weight = make_weight(130, columns, group_size, zeros=zeros)
    bias = activations(130)
    for tokens in (1, 20):
        x = activations(tokens, columns)
        assert_close(call(x, weight, 3, bias), x, weight, 3, bias)
    assert len(device) == 2


@pytest.mark.parametrize("device", ["sm_90a"], indirect=True)
@pytest.mark.parametrize(("columns", "group_size"), [(30, 30), (72, 64), (200, 128), (576, 128), (81, 32)])
def test_a_short_last_group_reaches_the_kernels_with_wgmma(device, columns, group_size):
    weight = make_weight(130, columns, group_size)
    for tokens in (20, 70, MAX_M + 1):
        x = activations(tokens, columns)
        exact, dense = (x.double() @ weight.dequantize(3, dtype).double().T for dtype in (torch.float64, torch.float16))
        rounding = (dense.to(x.dtype).double() - exact).norm()
        assert (call(x, weight, 3).double() - exact).norm() <= 1.2 * rounding
    assert [made.get("WGMMA") for made, _ in device] == [1, 1, None]  # the last one dequantizes


@pytest.mark.parametrize("options", [{"zeros": True}, {"scale_bits": (2, 3)}], ids=str)
def test_layers_that_share_their_input_reach_the_kernel_in_one_launch(device, monkeypatch, options):
    """The kernel runs for tensors on the CPU, where the layers are fused for this test."""

    def by_kernel(x, weight, bias, bits):
        tensors = (weight.planes, weight.scales, weight.zeros)
        return cuda_ops.linear(x, *tensors, bias, bits, weight.out_features, weight.in_features, *weight.format.op_args)

    monkeypatch.setattr(torch_reference, "linear", by_kernel)
    weights = [make_weight(rows, 256, 64, seed=rows, **options) for rows in (128, 70, 64)]
    layers = [NestedLinear.from_planes(weight, activations(len(weight.codes))) for weight in weights]
    fused = FusedLayers(layers, ["cpu"])
    assert fused.is_packed
    for bits, launches in (((3, 3, 3), 1), ((2, 2, 5), 2), ((5, 2, 2), 2)):
        for layer, width in zip(layers, bits, strict=True):
            layer.bits = width
        x = activations(3, 256)
        device.clear()
        for layer, weight, width in zip(layers, weights, bits, strict=True):
            assert_close(layer(x), x, weight, width, layer.bias)
        assert len(device) == launches


def test_a_launch_is_planned_once_for_all_calls_like_it(device):
    weight = make_weight(64, 128, 128)
    for _ in range(3):
        call(activations(2, 128), weight, 4)
    assert planned() == 1
    call(activations(3, 128), weight, 4)
    call(activations(2, 128), weight, 5)
    assert planned() == 3
    assert len(device) == 5


def test_activations_at_odd_addresses_are_moved(device):
    weight = make_weight(64, 128, 128)
    x = activations(2 * 128 + 1)[1:].view(2, 128)
    assert x.data_ptr() % 16
    assert_close(call(x, weight, 4), x, weight, 4)
    spread = activations(2, 256)[:, ::2]
    assert_close(call(spread, weight, 4), spread, weight, 4)


@pytest.mark.parametrize("columns", [128, 136])
def test_many_tokens_go_through_decoded_strips(device, monkeypatch, columns):
    monkeypatch.setattr(cuda_ops, "STRIP_WEIGHTS", 64 * columns)
    weight = make_weight(200, columns, 64, zeros=True)
    x, bias = activations(5, 20, columns, dtype=torch.bfloat16), activations(200, dtype=torch.bfloat16)
    assert_close(call(x, weight, 3, bias), x, weight, 3, bias, rounds_weights=True)
    assert len(device) == 4  # of 64 rows each
    assert call(activations(0, columns), weight, 3).shape == (0, 200)


@pytest.mark.parametrize("device", ["sm_90a"], indirect=True)
def test_with_wgmma_tokens_by_the_hundred_take_one_launch(device):
    weight, bias = make_weight(130, 384, 128, offset=8.0), activations(130)
    for tokens in (16, 17):
        x = activations(tokens, 384)
        assert_close(call(x, weight, 3, bias), x, weight, 3, bias)
    for tokens in (70, 300, MAX_M + 1):
        x = activations(tokens, 384)
        assert_close(call(x, weight, 3, bias), x, weight, 3, bias, rounds_weights=True)
    shapes = [(made.get("WGMMA"), made.get("BLOCK_M")) for made, _ in device]
    assert shapes == [(0, 16), (1, 32), (1, 128), (1, 128), (None, None)]  # the last one dequantizes


@pytest.mark.parametrize("device", ["sm_90a"], indirect=True)
def test_offsets_that_16_bits_do_not_hold_go_without_wgmma_and_that_is_said_once(device, caplog):
    cuda_ops._warn_without_wgmma.cache_clear()
    weight = make_weight(64, 128, 128, offset=7.3)
    for tokens in (40, 41):
        x = activations(tokens, 128)
        assert_close(call(x, weight, 4), x, weight, 4)
    assert [made["WGMMA"] for made, _ in device] == [0, 0]
    assert caplog.text.count("zero-point offset of 7.3") == 1


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("slicing", "stretch"), [("msb", 1.0), ("msb", 1.25), ("msb", 1.5), ("round", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_are_called_exact_where_they_are(dtype, slicing, stretch, zeros):
    """Against every code and zero point, in the arithmetic of the dtype."""
    for bits, offset in itertools.product(range(2, 9), (0.0, 0.5, 3.0, 7.3, 8.0)):
        problem = GemmShape(
            tokens=64,
            rows=64,
            depth=128,
            bits=bits,
            dtype=dtype,
            format=WeightFormat(
                group_size=128,
                slicing=slicing,
                zero_point_offset=offset,
                has_zero_points=zeros,
                scale_dtype=dtype,
                stretch=stretch,
            ),
        )
        start, step, _ = problem.affine()
        distances = start - step * torch.arange(256 if zeros else 1, dtype=torch.float64)
        codes = torch.arange(2**bits, dtype=torch.float64)[:, None]
        nibble, stretched = 2.0 ** (bits - 4), stretch != 1 and bits > 4
        low = codes % nibble if bits > 4 else torch.zeros_like(codes)
        codes = codes + (stretch - 1) * low if stretched else codes
        if dtype == torch.bfloat16 and (bits == 8 or stretched):  # in two products
            codes, distances = low * stretch, distances - nibble * torch.trunc(distances / nibble)
        sums = codes + distances
        exact = bool((sums.to(dtype).double() == sums).all()) and bool(
            (distances.to(dtype).double() == distances).all()
        )
        if folds_zero_point_exactly(problem):
            assert exact
        elif offset in (0.0, 8.0):
            assert not exact, f"{problem} could use wgmma"
            assert zeros, "inexact with 8 bits of zero points and 3 of the stretched grid only"
            assert stretch != 1


@pytest.mark.parametrize(("master_bits", "slicing", "bits"), [(8, "msb", 3), (6, "round", 4)])
def test_decode_reaches_its_kernel(device, master_bits, slicing, bits):
    weight = make_weight(130, 100, 100, master_bits=master_bits, slicing=slicing)
    packed = NestedPlanes.pack(weight)
    dense = cuda_ops.dequantize(
        packed.planes,
        packed.scales,
        packed.zeros,
        bits,
        packed.out_features,
        packed.in_features,
        *packed.format.op_args,
        torch.bfloat16,
    )
    assert len(device) == 1
    assert torch.equal(dense, weight.dequantize(bits, torch.bfloat16))


@pytest.mark.parametrize(
    ("about", "dtype"),
    [
        ({"group_size": 48}, torch.float16),
        ({"group_size": 4}, torch.float16),
        ({"group_size": 36}, torch.float16),
        ({"group_size": 32}, torch.float32),
        ({"group_size": 32, "dtype": torch.float32}, torch.float16),
    ],
)
def test_what_the_kernels_do_not_take_is_computed_by_torch_and_said(device, caplog, about, dtype):
    weight = make_weight(64, 96, **about)
    x = activations(2, 96, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        y = call(x, weight, 4)
        call(x, weight, 4)
    torch.testing.assert_close(y.double(), x.double() @ weight.dequantize(4).double().T, rtol=4e-3, atol=4e-3)
    assert not device
    assert caplog.text.count("is computed by torch, slowly") == 1


def test_large_matrices_meet_up_to_128_tokens_in_two_launches(device, monkeypatch):
    monkeypatch.setattr(launch_config, "_MIN_WEIGHTS_TWO_LAUNCHES", 64 * 128)
    weight, bias = make_weight(64, 128, 128), activations(64)
    x = activations(9, 11, 128)  # 99 tokens: 50 and 49
    assert_close(call(x, weight, 3, bias), x, weight, 3, bias)
    assert len(device) == 2


def test_a_first_call_within_a_capture_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UserError, match="Run the model once at these bits and this batch size before the capture"):
        call(activations(2, 128), make_weight(64, 128, 128), 4)


def test_wrong_calls_are_refused_before_anything_is_planned(device):
    weight = make_weight(64, 128, 128)
    for x, bits, bias, sentence in (
        (activations(2, 64), 4, None, r"x must be \[..., 128\]; found \[2, 64\]"),
        (activations(2, 128).double(), 4, None, "found torch.float64"),
        (torch.tensor(1.0), 4, None, "found a tensor without dimensions"),
        (activations(2, 128), 9, None, "a whole number in 2..8; found 9"),
        (activations(2, 128), 4, activations(63), r"The bias must be .*\[64\]"),
    ):
        with pytest.raises(UserError, match=sentence):
            call(x, weight, bits, bias)
    packed = NestedPlanes.pack(weight)
    transposed = packed.planes.transpose(-1, -2).contiguous().transpose(-1, -2)
    good = (activations(2, 128), packed.planes, packed.scales, None, None, 4, 64, 128, *packed.format.op_args)
    cuda_ops.linear(*good)
    with pytest.raises(UserError, match="must be contiguous int32"):
        cuda_ops.linear(good[0], transposed, *good[2:])
    assert planned() == len(device) == 1


@pytest.fixture
def streams(monkeypatch):
    """A device whose stream and whose state of capture the test sets; its memory is the CPU's."""
    state = types.SimpleNamespace(stream=1, capturing=False, threads=set(), used_by=[])

    class Stream(contextlib.nullcontext):
        def __enter__(self):
            state.threads.add(threading.get_ident())

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: state.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: state.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: state.used_by.append(stream))
    monkeypatch.setattr(workspace, "_SLAB", 100)
    return state


def test_a_stream_keeps_its_counters_and_captured_launches_share_none(streams):
    held = workspace.Workspace(torch.device("cpu", 0))
    places = set()

    def take(count, new):
        found, room = held.acquire(count, 3 * count)
        assert (room.dtype, room.numel() >= 3 * count) == (torch.float32, True)
        workspaces.append(room)
        assert found.dtype == torch.int32
        assert found.numel() >= count
        assert not found.any()
        mine = set(range(found.data_ptr(), found.data_ptr() + 4 * found.numel(), 4))
        assert mine.isdisjoint(places) if new else mine <= places
        places.update(mine)
        kept.append(found)

    kept, workspaces = [], []
    take(10, new=True)
    take(7, new=False)
    assert workspaces[0].data_ptr() == workspaces[1].data_ptr()
    streams.stream = 2
    take(10, new=True)
    streams.stream = 1
    take(20, new=True)  # more than the stream has had
    streams.capturing = True
    for _ in range(5):
        take(10, new=True)
    take(30, new=True)  # the slab is used up, and none can be made during a capture
    streams.capturing = False
    take(20, new=False)
    take(200, new=True)
    # The pool of a graph collects what the thread of its warm-up allocates, and what is allocated on its stream.
    assert streams.threads
    assert threading.get_ident() not in streams.threads
    assert streams.used_by == [1, 1, 2, 1, 1, 1]  # slab, workspaces of both streams, larger ones, another slab


@pytest.mark.parametrize(
    ("shared", "wgmma"),
    [(100, False), (164, False), (228, False), (228, True)],
    ids=["sm_86", "sm_80", "sm_90", "sm_90a"],
)
@pytest.mark.parametrize(("group_size", "zeros"), [(32, True), (64, False), (128, False), (192, False), (-1, True)])
def test_every_plan_fits_its_device(shared, wgmma, group_size, zeros):
    """With the shared memory of a multiprocessor in KiB, of which each block costs one more than it gets."""
    device = DeviceLimits(multiprocessors=108, shared_bytes=1024 * shared, wgmma=wgmma, clusters=shared == 228)
    for tokens, (rows, depth), bits in itertools.product(
        (1, 3, 8, 9, 16, 17, 32, 33, GEMM_MAX_M, 65, MAX_M),
        ((4096, 14208), (3328, 4096), (64, 384), (16384, 16128)),
        range(2, 9),
    ):
        problem = GemmShape(
            tokens=tokens,
            rows=rows,
            depth=depth,
            bits=bits,
            dtype=torch.float16,
            format=WeightFormat(
                group_size=depth if group_size == -1 else group_size, slicing="round", has_zero_points=zeros
            ),
        )
        assert is_supported(problem)
        if tokens > max_tokens(problem, device):
            continue
        launch, tile = make_launch_config(problem, device), choose_tile_config(problem, device)
        assert launch.block <= 1024
        assert tile.ctas_per_sm * (launch.shared_bytes + 1024) <= device.shared_bytes
        assert FAMILIES[tile.family].wgmma == (wgmma and tokens > 16)
        assert FAMILIES[tile.family].wgmma or tile.block_m >= tokens
        assert 1 <= launch.grid <= 108 * tile.ctas_per_sm
        assert launch.grid % tile.cluster == 0
        assert tile.cluster == 1 or device.clusters
        columns = tile.block_k  # of a chunk: it holds whole groups, or is a whole part of one
        assert not problem.group or problem.group % columns == 0 or columns % problem.group == 0
