// Everything that a kernel here asks of the machine: types, launch qualifiers, and each PTX instruction as a function.
//
// Kernels include this file and no CUDA header, so that NVRTC needs no include path. With EMULATOR defined the same names come
// from cpu_emulator/emulator.h instead and a kernel compiles as plain C++, to run on a CPU. What CUDA itself declares (threadIdx,
// __syncthreads, __shfl_xor_sync, atomicAdd, fmaf, ...) is used by its own name; the stand-in declares that too.
#pragma once

#define UNROLL _Pragma("unroll")

#ifdef EMULATOR
#include "cpu_emulator/emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define DEVICE_CONSTANT __host__ __device__
#define KERNEL extern "C" __global__
#define LAUNCH_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)
// The block's dynamic shared memory; there is no static one in this project.
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
// Of a structure that is a kernel's argument and whose address is taken.
#define GRID_CONSTANT __grid_constant__

// Waits for `threads` threads of the block, a multiple of 32, at barrier `id` of 1..15 (0 is __syncthreads).
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// The same number, of which the compiler knows nothing: what follows from it is computed where it is used, and not long before, in
// registers that are needed until then.
DEVICE u32 opaque(u32 a) {
    asm volatile("" : "+r"(a));
    return a;
}

// ---- integers

// Bits of `a` where `mask` is set, of `b` elsewhere.
DEVICE u32 bit_select(u32 mask, u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
    return d;
}

// (a & mask) | b, in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

DEVICE u32 rotate_right(u32 a, int by) { return __funnelshift_r(a, a, by); }

// 1 / f to two units in the last place; a subnormal f counts as 0.
DEVICE float reciprocal(float f) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(f));
    return r;
}

// ---- 16-bit floats

DEVICE float half_to_float(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

DEVICE u16 float_to_half(float f) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

DEVICE float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u16 float_to_bfloat(float f) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

// Two at once, the first in the low half.
DEVICE u32 floats_to_halves(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE u32 floats_to_bfloats(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// a * b + c for two at once, rounded once; subnormal numbers count in full.
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE u32 fma_bfloats(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// ---- memory

// An address within shared memory, as the instructions below take it. Made once and then added to: each conversion of a pointer
// costs instructions.
typedef u32 SharedAddress;
DEVICE SharedAddress shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes that are read once: not kept in L1.
DEVICE uint4 load_streaming(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// Starts copying 16 bytes to shared memory: the first `valid` from `source`, zeros after them.
DEVICE void copy_async(SharedAddress shared, const void* source, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(valid)
                 : "memory");
}

// Closes the group of the copies that this thread started since the last call.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's youngest groups are still on their way.
template <int pending> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// What blocks of one launch hand to each other goes through these two, past L1: the writer calls device_fence() after the
// store and before it tells the reader (an atomic), the reader calls it after it was told and before the load. It orders as
// much as that needs; __threadfence() also orders all fences of the device and takes longer.
DEVICE void device_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

DEVICE void store_for_other_blocks(float4* p, float4 v) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

DEVICE float4 load_from_other_blocks(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// ---- launches that overlap: matquant/cuda/pdl.py, from sm_90 on; elsewhere these do nothing, as a launch waits by itself

// A kernel that is launched so calls this before it reads what an earlier kernel may have written, and before it writes. All
// that ran before it is then complete and to be seen.
DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may come in as this one's make room. After the wait, so that no more than two kernels are under way.
DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings the line of an address to the second-level cache, which is right to do at any time: nothing is read.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16 with .f16 and .bf16")

// Four 8x8 matrices of 16-bit elements; lane 8i + j gives the address of row j of matrix i.
DEVICE void load_matrices(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// d = a b + c, with a 16x16, b 16x8, c and d 16x8 in float32. Subnormal float16 inputs count in full.
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

#endif
