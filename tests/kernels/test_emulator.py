"""CPU emulator: results equal CUDA's, and every kind of error that it claims to detect is detected."""

import ctypes

import pytest
import torch

from tests.kernels.emulator import EmulatedKernel, EmulatorError, compile_kernel, have_compiler

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]

KERNELS = """
#include "device.cuh"

KERNEL void shuffles(const float* in, float* out) {
    int lane = threadIdx.x % 32;
    float v = in[threadIdx.x];
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    float first = __shfl_sync(~0u, in[threadIdx.x], 0, 8);
    float next = __shfl_down_sync(~0u, in[threadIdx.x], 1);
    if (lane < 4) first += __shfl_xor_sync(0xFu, first, 1);
    out[threadIdx.x] = v;
    out[64 + threadIdx.x] = first;
    out[128 + threadIdx.x] = next;
    out[192 + threadIdx.x] = (float)__popc(__ballot_sync(~0u, lane % 3 == 0));
}
KERNEL void transpose(const u32* in, u32* out) { out[threadIdx.x] = transpose_8x8(in[threadIdx.x]); }
KERNEL void product(const u16* a, const u16* b, float* d) {
    SHARED_MEMORY(shared);
    u16* tile = (u16*)shared; // a [16][24], then b [8][24]: rows padded to 48 bytes
    int lane = threadIdx.x;
    for (int i = lane; i < 48; i += 32) {
        const u16* from = i < 32 ? a + i / 2 * 16 + i % 2 * 8 : b + (i - 32) / 2 * 16 + i % 2 * 8;
        cp_async(shared_address(tile + (i / 2) * 24 + i % 2 * 8), from);
    }
    cp_async_commit();
    WAIT;
    __syncwarp();
    u32 fa[4], fb[4];
    ldmatrix_x4(fa, shared_address(tile + (lane % 16) * 24 + lane / 16 * 8));
    ldmatrix_x4(fb, shared_address(tile + (16 + lane % 8) * 24 + (lane / 8 % 2) * 8));
    float c[4] = {0, 0, 0, 0};
    MMA(c, fa, fb[0], fb[1], c);
    for (int e = 0; e < 4; e++) d[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = c[e];
}
KERNEL void exchange(float4* partial, u32* semaphore, float* sum) {
    SHARED_MEMORY(shared);
    store_cg(partial + blockIdx.x * blockDim.x + threadIdx.x, make_float4(1, 2, 3, blockIdx.x));
    WRITER_FENCE;
    __syncthreads();
    u32* last = (u32*)shared;
    if (threadIdx.x == 0) *last = atomicAdd(semaphore, 1u);
    __syncthreads();
    if (*last != gridDim.x - 1) return;
    READER_FENCE;
    float total = 0;
    for (int i = 0; i < (int)gridDim.x; i++) total += load_cg(partial + i * blockDim.x + threadIdx.x).w;
    sum[threadIdx.x] = total;
}
KERNEL void mistakes(int which, int* out) {
    SHARED_MEMORY(shared);
    int lane = threadIdx.x % 32;
    if (which == 1 && lane < 16) __syncwarp();
    if (which == 2) { if (lane < 16) __syncwarp(); else __ballot_sync(~0u, 1); }
    if (which == 3) { if (threadIdx.x < 32) __syncthreads(); else if (lane == 0) __syncwarp(1u << 1); }
    if (which == 4) cp_async(shared_address(shared + 8), shared);
    if (which == 5) { cp_async(shared_address(shared), out); cp_async_commit(); }
    if (which == 6) out[lane] = out[64 + threadIdx.x * 100000];
    if (which == 7 && threadIdx.x < 32) { u32 r[4]; if (lane < 31) ldmatrix_x4(r, shared_address(shared)); }
    out[threadIdx.x] = which;
}
"""
CORRECT = {
    "WAIT": "cp_async_wait<0>()",
    "MMA": "mma_f16",
    "WRITER_FENCE": "fence_acq_rel_gpu()",
    "READER_FENCE": "fence_acq_rel_gpu()",
}


def build(function: str, *, sanitize: bool = False, **changes: str) -> EmulatedKernel:
    """One of the kernels, with some of the ``CORRECT`` statements changed."""
    text = KERNELS
    for name, code in {**CORRECT, **changes}.items():
        text = text.replace(name, code)
    return compile_kernel(text, function, {}, sanitize=sanitize)


def exchange(kernel: EmulatedKernel, seed: int) -> tuple[torch.Tensor, int]:
    """Sums over 7 blocks for each of 40 threads, and the semaphore."""
    blocks, threads = 7, 40
    partial, total = torch.zeros(blocks, threads, 4), torch.zeros(threads)
    semaphore = torch.zeros(1, dtype=torch.int32)
    kernel.launch((blocks,), (threads,), [partial, semaphore, total], shared_bytes=16, seed=seed)
    return total, int(semaphore)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffles_and_votes(seed: int) -> None:
    x, out = torch.randn(64), torch.full((256,), torch.nan)
    build("shuffles").launch((1,), (64,), [x, out], seed=seed)
    warps = x.view(2, 32)
    assert torch.allclose(out[:64].view(2, 32), warps.sum(1, keepdim=True).expand(2, 32), atol=1e-5)
    first = warps.view(2, 4, 8)[:, :, :1].expand(2, 4, 8).reshape(2, 32).clone()
    first[:, :4] *= 2
    assert torch.equal(out[64:128].view(2, 32), first)
    assert torch.equal(out[128:192].view(2, 32), torch.cat([warps[:, 1:], warps[:, 31:]], dim=1))
    assert (out[192:] == 11).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_transposition(seed: int) -> None:
    matrix, out = torch.randint(-(2**15), 2**15, (8, 8), dtype=torch.int16), torch.zeros(8, 8, dtype=torch.int16)
    build("transpose").launch((1,), (32,), [matrix.view(torch.int32), out.view(torch.int32)], seed=seed)
    assert torch.equal(out, matrix.T)


@pytest.mark.parametrize(("dtype", "mma"), [(torch.float16, "mma_f16"), (torch.bfloat16, "mma_bf16")])
def test_tensor_core_product(dtype: torch.dtype, mma: str) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    a[0, 0] = 2.0**-24 if dtype == torch.float16 else 2.0**-100  # subnormal in float16
    d = torch.full((16, 8), torch.nan)
    build("product", MMA=mma).launch((1,), (32,), [a.view(torch.int16), b.view(torch.int16), d], shared_bytes=24 * 48)
    assert torch.allclose(d, a.float() @ b.float().T, atol=1e-5)


def test_missing_wait_for_cp_async_is_detected() -> None:
    a, b = torch.ones(16, 16, dtype=torch.float16), torch.ones(8, 16, dtype=torch.float16)
    args = [a.view(torch.int16), b.view(torch.int16), torch.zeros(16, 8)]
    with pytest.raises(EmulatorError, match="pending cp.async"):
        build("product", WAIT="").launch((1,), (32,), args, shared_bytes=24 * 48)


@pytest.mark.parametrize("seed", range(4))
def test_exchange_between_blocks(seed: int) -> None:
    total, semaphore = exchange(build("exchange"), seed)
    assert (total == sum(range(7))).all()
    assert semaphore == 7


@pytest.mark.parametrize("missing", ["WRITER_FENCE", "READER_FENCE"])
def test_missing_fence_is_detected(missing: str) -> None:
    kernel = build("exchange", **{missing: ""})
    assert not all((exchange(kernel, seed)[0] == sum(range(7))).all() for seed in range(6))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (1, "deadlock"),
        (2, "diverged"),
        (3, "mask leaves out"),
        (4, "misaligned"),
        (5, "pending cp.async"),
        (7, "deadlock"),
    ],
)
def test_mistakes_are_named(which: int, message: str) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    kernel = build("mistakes")
    kernel.launch((1,), (64,), [0, out], shared_bytes=128)
    with pytest.raises(EmulatorError, match=message):
        kernel.launch((1,), (64,), [which, out], shared_bytes=128)


def test_sanitizer_detects_reads_outside_a_buffer() -> None:
    kernel = build("mistakes", sanitize=True)
    out = torch.zeros(64, dtype=torch.int32)
    kernel.launch((1,), (64,), [8, out], shared_bytes=128)
    assert (out == 8).all()
    with pytest.raises(EmulatorError, match="AddressSanitizer"):
        kernel.launch((1,), (64,), [6, out], shared_bytes=128)


def test_arguments_of_the_wrong_size_raise() -> None:
    with pytest.raises(TypeError, match="takes parameters of"):
        build("mistakes").launch((1,), (64,), [ctypes.c_int64(0), torch.zeros(64, dtype=torch.int32)])
