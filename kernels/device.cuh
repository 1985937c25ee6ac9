// Integer types, launch qualifiers, and PTX instructions as functions.
//
// Kernels include this header and no CUDA header, so NVRTC needs no include path. With EMULATOR defined, cpu_emulator/emulator.h
// declares the same names, and a kernel compiles as plain C++ for the CPU. Names that CUDA itself declares (threadIdx,
// __syncthreads, __shfl_xor_sync, atomicAdd, fmaf, ...) are used directly; the emulator declares them too.
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
// Blocks of a thread block cluster, from sm_90 on.
#define CLUSTER_DIMS(blocks) __cluster_dims__(blocks, 1, 1)
// Dynamic shared memory of the block. No kernel uses static shared memory.
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
// For kernel parameters whose address is taken, for example TMA descriptors.
#define GRID_CONSTANT __grid_constant__

// bar.sync: barrier `id` (1..15; 0 is __syncthreads) for `threads` threads of the block, a multiple of 32.
DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Return `a`, opaque to the compiler. Expressions that depend on the result are computed where they are used; the compiler cannot
// hoist them and keep them in registers.
DEVICE u32 opaque(u32 a) {
    asm volatile("" : "+r"(a));
    return a;
}

// ---- integers

// Bits of `a` where `mask` is 1, bits of `b` where it is 0.
DEVICE u32 bit_select(u32 mask, u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
    return d;
}

// (a & mask) | b in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

DEVICE u32 rotate_right(u32 a, int by) { return __funnelshift_r(a, a, by); }

// 1 / f within 2 ulp. Subnormal inputs are flushed to 0.
DEVICE float reciprocal_approx(float f) {
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

// Packed pair; `low` is in bits 0..15.
DEVICE u32 floats_to_half2(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE u32 floats_to_bfloat2(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// a * b + c on packed pairs, rounded once. Subnormals are not flushed.
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// ---- memory

// Address in the shared window, as PTX instructions take it. Convert once and add offsets: every conversion costs instructions.
typedef u32 SharedAddress;
DEVICE SharedAddress shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16-byte load of read-once data; bypasses L1 allocation.
DEVICE uint4 load_streaming(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// Start a 16-byte cp.async from global to shared memory: the first `valid` bytes from `source`, zeros after them.
DEVICE void cp_async(SharedAddress shared, const void* source, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(valid)
                 : "memory");
}

// Commit this thread's cp.async copies since the last call as one group.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `pending` of this thread's most recent groups are incomplete.
template <int pending> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Acquire-release fence of device scope. Data exchanged between blocks needs one on both sides: store_cg, fence, atomic in the
// writer; atomic, fence, load_cg in the reader. __threadfence() is sequentially consistent and slower.
DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Store that bypasses L1.
DEVICE void store_cg(float4* p, float4 v) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Load that bypasses L1.
DEVICE float4 load_cg(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Prefetch the cache line of an address into L2. Valid before pdl_wait(), because no value is read.
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- programmatic dependent launch (PDL; matquant/cuda/pdl.py), from sm_90 on. No-ops elsewhere: there a launch starts after the
// previous kernel has ended.

// Wait until all earlier kernels have completed and their writes are visible. A kernel launched with PDL calls this before it
// reads data of an earlier kernel and before it writes.
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allow the next kernel's blocks to be scheduled as this kernel's blocks exit. Call after pdl_wait(), so that at most two kernels
// overlap.
DEVICE void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16 with .f16 and .bf16")

// ldmatrix.x4: four 8x8 matrices of 16-bit elements. Lane 8i + j holds the address of row j of matrix i.
DEVICE void ldmatrix_x4(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// Transpose an 8x8 matrix of 16-bit elements. Lane 4i + j holds elements 2j and 2j + 1 of row i, before and after.
DEVICE u32 transpose_8x8(u32 pair) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// d = a b + c with a [16, 16], b [16, 8], c and d [16, 8] in float32. Subnormal float16 inputs are not flushed.
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

#endif
