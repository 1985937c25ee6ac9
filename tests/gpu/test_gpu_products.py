"""Products of nested weights on a GPU, against float64 and dense matrices. Skipped without an NVIDIA GPU and CuPy."""

import pytest
import torch
from on_gpu import NEEDS_GPU, activations, times_rounding
from weights import make_weight

from matquant.inference import NestedPlanes, ops
from matquant.inference.gemm_shape import GemmShape

pytestmark = NEEDS_GPU


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
