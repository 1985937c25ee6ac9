"""The stand-in itself: that it computes what CUDA computes, and that it notices what it says it notices."""

import ctypes

import pytest
import torch
from tests.kernels.emulator import EmulatorError, compile_kernel, have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")

HEADER = '#include "device.cuh"\n'

EXERCISES = (
    HEADER
    + """
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
KERNEL void product(const u16* a, const u16* b, float* d) {
    SHARED_MEMORY(shared);
    u16* tile = (u16*)shared; // a [16][24], then b [8][24]: rows padded to 48 bytes
    int lane = threadIdx.x;
    for (int i = lane; i < 48; i += 32) {
        const u16* from = i < 32 ? a + i / 2 * 16 + i % 2 * 8 : b + (i - 32) / 2 * 16 + i % 2 * 8;
        cp_async(shared_address(tile + (i / 2) * 24 + i % 2 * 8), from);
    }
    cp_async_commit();
    WAIT
    BARRIER
    u32 fa[4], fb[4];
    ldmatrix_x4(fa, shared_address(tile + (lane % 16) * 24 + lane / 16 * 8));
    ldmatrix_x4(fb, shared_address(tile + (16 + lane % 8) * 24 + (lane / 8 % 2) * 8));
    float c[4] = {0, 0, 0, 0};
    MMA(c, fa, fb[0], fb[1], c);
    for (int e = 0; e < 4; e++) d[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = c[e];
}
KERNEL void exchange(float4* partial, u32* ticket, float* sum) {
    SHARED_MEMORY(shared);
    store_cg(partial + blockIdx.x * blockDim.x + threadIdx.x, make_float4(1, 2, 3, blockIdx.x));
    WRITER_FENCE
    __syncthreads();
    u32* last = (u32*)shared;
    if (threadIdx.x == 0) *last = atomicAdd(ticket, 1u);
    __syncthreads();
    if (*last != gridDim.x - 1) return;
    READER_FENCE
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
)
SOUND = {
    "WAIT": "cp_async_wait<0>\\(\\)\\;",
    "BARRIER": "__syncwarp\\(\\)\\;",
    "MMA": "mma_f16",
    "WRITER_FENCE": "__threadfence\\(\\)\\;",
    "READER_FENCE": "__threadfence\\(\\)\\;",
}


def build(function: str, *, sanitize: bool = False, **changed: str):
    defines = {**SOUND, **changed}
    text = EXERCISES
    for name, value in defines.items():
        text = text.replace(name, value.replace("\\", ""))
    return compile_kernel(text, function, {}, sanitize=sanitize)


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


@pytest.mark.parametrize(("dtype", "mma"), [(torch.float16, "mma_f16"), (torch.bfloat16, "mma_bf16")])
def test_tensor_core_product(dtype: torch.dtype, mma: str) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    a[0, 0] = 2.0**-24 if dtype == torch.float16 else 2.0**-100  # subnormal in half
    d = torch.full((16, 8), torch.nan)
    build("product", MMA=mma).launch((1,), (32,), [a.view(torch.int16), b.view(torch.int16), d], shared_bytes=24 * 48)
    assert torch.allclose(d, a.float() @ b.float().T, atol=1e-5)


def test_copies_count_only_after_their_wait() -> None:
    a, b = torch.ones(16, 16, dtype=torch.float16), torch.ones(8, 16, dtype=torch.float16)
    d = torch.zeros(16, 8)
    args = [a.view(torch.int16), b.view(torch.int16), d]
    with pytest.raises(EmulatorError, match="pending"):
        build("product", WAIT="").launch((1,), (32,), args, shared_bytes=24 * 48)


@pytest.mark.parametrize("seed", range(4))
def test_exchange_between_blocks(seed: int) -> None:
    blocks, threads = 7, 40
    partial, ticket, total = torch.zeros(blocks, threads, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(threads)
    build("exchange").launch((blocks,), (threads,), [partial, ticket, total], shared_bytes=16, seed=seed)
    assert (total == sum(range(blocks))).all()
    assert int(ticket) == blocks


@pytest.mark.parametrize("missing", ["WRITER_FENCE", "READER_FENCE"])
def test_missing_fence_is_noticed(missing: str) -> None:
    blocks, threads = 7, 40
    kernel = build("exchange", **{missing: ""})
    wrong = 0
    for seed in range(6):
        partial, ticket, total = (
            torch.zeros(blocks, threads, 4),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(threads),
        )
        kernel.launch((blocks,), (threads,), [partial, ticket, total], shared_bytes=16, seed=seed)
        wrong += not bool((total == sum(range(blocks))).all())
    assert wrong


@pytest.mark.parametrize(
    ("which", "says"),
    [(1, "deadlock"), (2, "diverged"), (3, "mask leaves out"), (4, "misaligned"), (5, "pending"), (7, "deadlock")],
)
def test_mistakes_are_named(which: int, says: str) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    kernel = build("mistakes")
    kernel.launch((1,), (64,), [0, out], shared_bytes=128)
    with pytest.raises(EmulatorError, match=says):
        kernel.launch((1,), (64,), [which, out], shared_bytes=128)


def test_sanitizer_sees_reads_outside_a_buffer() -> None:
    kernel = build("mistakes", sanitize=True)
    out = torch.zeros(64, dtype=torch.int32)
    kernel.launch((1,), (64,), [8, out], shared_bytes=128)
    assert (out == 8).all()
    with pytest.raises(EmulatorError, match="AddressSanitizer"):
        kernel.launch((1,), (64,), [6, out], shared_bytes=128)


def test_arguments_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(TypeError, match="takes parameters of"):
        build("mistakes").launch((1,), (64,), [ctypes.c_int64(0), torch.zeros(64, dtype=torch.int32)])
