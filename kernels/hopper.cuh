// Instructions of sm_90 and sm_90a: thread block clusters, mbarriers, TMA loads, WGMMA and register reallocation (PTX ISA,
// "barrier.cluster", "st.async", "mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions", "setmaxnreg").
//
// WGMMA: d += a b by one warpgroup (four warps), asynchronously. a [64, 16] is in registers, 16 rows per warp in the A fragment of
// mma.m16n8k16. b [16, N] is in shared memory as [N, 64] with 128-byte rows; one instruction reads 16 of the 64 columns. Until
// wgmma_wait, d and a must not be accessed and b must not be written.
//
// b uses the 128-byte swizzle, which a TMA load applies: 16-byte chunk j of row i is stored at chunk j ^ (i % 8).
#pragma once
#include "device.cuh"

#ifndef EMULATOR // cpu_emulator/emulator.h declares the same names

// ---- setmaxnreg: register reallocation, executed by all warps of a warpgroup. All warps start with the same number of registers.

// Release registers above `registers` per thread, a multiple of 8.
template <int registers> DEVICE void warpgroup_reg_dealloc() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

// Raise the limit to `registers` per thread. Blocks until the block's register pool has enough free registers.
template <int registers> DEVICE void warpgroup_reg_alloc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }

constexpr int kSwizzleAlignment = 1024; // bytes: alignment of a 128-byte-swizzled tile (8 rows of 128 bytes)

// ---- mbarriers

// Initialize an mbarrier, 8 bytes of shared memory. One thread initializes it; __syncthreads() makes it visible to the block. A phase
// completes after `arrivals` arrivals and after all expected bytes have been written.
DEVICE void mbarrier_init(SharedAddress barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive and add `bytes` to the bytes expected in the current phase.
DEVICE void mbarrier_arrive_expect_tx(SharedAddress barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait for completion of the phase with this parity. Parities alternate 0, 1, 0, ...
DEVICE void mbarrier_wait(SharedAddress barrier, u32 parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// ---- thread block clusters

// Arrive at the barrier of all threads of the cluster, without ordering memory. A release costs a fence of the whole GPU.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Wait until all threads of the cluster that have not ended have arrived; initializations of mbarriers before are visible then.
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Start a store to the shared memory of block `rank` of the cluster, at an address of this block's. It counts as 16 bytes at that block's
// mbarrier of address `barrier`. The block must have begun, and must not end before its mbarrier has completed.
DEVICE void store_cluster_async(SharedAddress address, SharedAddress barrier, u32 rank, float4 v) {
    asm volatile("{ .reg .u32 to, at; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 at, %1, %2;"
                 " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [at]; }" ::"r"(address),
                 "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// Wait as mbarrier_wait does, for stores of other blocks of the cluster.
DEVICE void mbarrier_wait_cluster(SharedAddress barrier, u32 parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
                     barrier),
                 "r"(parity)
                 : "memory");
}

// ---- TMA loads

// TMA descriptor (CUtensorMap) of a two- or three-dimensional array, encoded by the driver (matquant/cuda/tma.py).
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Start a TMA load of the tile at (row, column). Elements outside the array are written as 0 and count as bytes.
DEVICE void tma_load_2d(SharedAddress to, const TensorMap* from, int row, int column, SharedAddress barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(from), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

DEVICE void tma_load_3d(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(from), "r"(column), "r"(row), "r"(layer), "r"(barrier)
                 : "memory");
}

// ---- WGMMA

typedef u64 WgmmaDescriptor;

// Shared-memory matrix descriptor of 16 columns of 128-byte rows. `b` is a multiple of 32 bytes within a row.
DEVICE WgmmaDescriptor wgmma_descriptor(SharedAddress b) {
    const u32 eight_rows = 8 * 128, swizzle_128b = 1;
    return (u64)(b >> 4 & 0x3FFF | 1 << 16) | (u64)(eight_rows >> 4 | swizzle_128b << 30) << 32;
}

// Required before the first WGMMA, and after registers of d or a were written since the last one.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Commit the WGMMAs since the last call as one group.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `pending` of the most recent groups are incomplete.
template <int pending> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// After wgmma_wait: prevents the compiler from moving reads of d before the wait.
DEVICE void warpgroup_fence_operand(float (&d)[4]) { asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory"); }

#define REGISTERS_4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define REGISTERS_8 REGISTERS_4(0, 1, 2, 3) ", " REGISTERS_4(4, 5, 6, 7)
#define REGISTERS_16 REGISTERS_8 ", " REGISTERS_4(8, 9, 10, 11) ", " REGISTERS_4(12, 13, 14, 15)
#define REGISTERS_32 \
    REGISTERS_16 ", " REGISTERS_4(16, 17, 18, 19) ", " REGISTERS_4(20, 21, 22, 23) ", " REGISTERS_4(24, 25, 26, 27) ", " REGISTERS_4(28, 29, 30, 31)
#define REGISTERS_64 \
    REGISTERS_32 ", " REGISTERS_4(32, 33, 34, 35) ", " REGISTERS_4(36, 37, 38, 39) ", " REGISTERS_4(40, 41, 42, 43) ", " \
    REGISTERS_4(44, 45, 46, 47) ", " REGISTERS_4(48, 49, 50, 51) ", " REGISTERS_4(52, 53, 54, 55) ", " REGISTERS_4(56, 57, 58, 59) ", " \
    REGISTERS_4(60, 61, 62, 63)
#define REGISTERS_128 \
    REGISTERS_64 ", " REGISTERS_4(64, 65, 66, 67) ", " REGISTERS_4(68, 69, 70, 71) ", " REGISTERS_4(72, 73, 74, 75) ", " \
    REGISTERS_4(76, 77, 78, 79) ", " REGISTERS_4(80, 81, 82, 83) ", " REGISTERS_4(84, 85, 86, 87) ", " REGISTERS_4(88, 89, 90, 91) ", " \
    REGISTERS_4(92, 93, 94, 95) ", " REGISTERS_4(96, 97, 98, 99) ", " REGISTERS_4(100, 101, 102, 103) ", " \
    REGISTERS_4(104, 105, 106, 107) ", " REGISTERS_4(108, 109, 110, 111) ", " REGISTERS_4(112, 113, 114, 115) ", " \
    REGISTERS_4(116, 117, 118, 119) ", " REGISTERS_4(120, 121, 122, 123) ", " REGISTERS_4(124, 125, 126, 127)
#define ACCUMULATORS_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ACCUMULATORS_2(i) ACCUMULATORS_1(i), ACCUMULATORS_1(i + 1)
#define ACCUMULATORS_4(i) ACCUMULATORS_2(i), ACCUMULATORS_2(i + 2)
#define ACCUMULATORS_8(i) ACCUMULATORS_4(i), ACCUMULATORS_4(i + 4)
#define ACCUMULATORS_16(i) ACCUMULATORS_8(i), ACCUMULATORS_8(i + 8)
#define ACCUMULATORS_32(i) ACCUMULATORS_16(i), ACCUMULATORS_16(i + 16)

// One instruction with N = 8 * tiles. `registers` are those of d; a0..a3 and b number the operands after them.
#define WGMMA_ASM(type, tiles, n, registers, a0, a1, a2, a3, b_operand) \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_operand ", add, 1, 1, 0; }" \
                 : ACCUMULATORS_##tiles(0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory")
#define WGMMA_FOR_TYPE(type) \
    if constexpr (tiles == 2) WGMMA_ASM(type, 2, 16, REGISTERS_8, 8, 9, 10, 11, 12); \
    if constexpr (tiles == 4) WGMMA_ASM(type, 4, 32, REGISTERS_16, 16, 17, 18, 19, 20); \
    if constexpr (tiles == 8) WGMMA_ASM(type, 8, 64, REGISTERS_32, 32, 33, 34, 35, 36); \
    if constexpr (tiles == 16) WGMMA_ASM(type, 16, 128, REGISTERS_64, 64, 65, 66, 67, 68); \
    if constexpr (tiles == 32) WGMMA_ASM(type, 32, 256, REGISTERS_128, 128, 129, 130, 131, 132)

// Issue one WGMMA of 8 * tiles tokens. d[i] is the accumulator of the warp's 16 rows and tokens 8i .. 8i + 7, in the layout of
// mma.m16n8k16. Subnormal float16 inputs are not flushed.
template <int tiles, bool bfloat> DEVICE void wgmma(float (*d)[4], const u32 (&a)[4], WgmmaDescriptor b) {
    static_assert(tiles == 2 || tiles == 4 || tiles == 8 || tiles == 16 || tiles == 32, "WGMMA is instantiated for N = 16, 32, 64, 128 and 256");
    if constexpr (bfloat) {
        WGMMA_FOR_TYPE("bf16");
    } else {
        WGMMA_FOR_TYPE("f16");
    }
}
#endif
