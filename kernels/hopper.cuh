// What sm_90a alone has: matrix products of four warps together, copies of whole tiles by one thread, barriers in shared memory
// that count their bytes, and registers that warps leave to others (PTX ISA, "Asynchronous warpgroup level matrix instructions",
// "cp.async.bulk.tensor", "mbarrier", "setmaxnreg").
//
// Products. d += a b for a [64, 16] in the registers of four warps, 16 rows of each in the fragments of mma.m16n8k16, and b [16, N]
// in shared memory as [N, 64], 128 bytes a row, of which it takes 16 columns. The instruction returns at once: until it was waited
// for, its registers must not be touched and its shared memory must not be written.
//
// In shared memory the eight pieces of 16 bytes of row i are in the order in which a tensor map for it has them put: piece j at
// j ^ (i % 8).
#pragma once
#include "device.cuh"

#ifndef EMULATOR // which declares the same

// ---- registers: by four warps together, which have the same number as all others at first

// Gives back what is more than so many, a multiple of 8, for each thread.
template <int registers> DEVICE void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

// Waits until others have given back what is missing to so many.
template <int registers> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }

constexpr int tile_alignment = 1024; // of what copy_tile writes and wgmma reads

// ---- copies of tiles

// An array of two or three dimensions and the size of its tiles, as the driver encodes it (matquant/cuda/tma.py).
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// A barrier is 8 bytes of shared memory. One thread sets it up; __syncthreads() then lets the others and the copies see it. Its
// phase ends when `arrivals` threads and all bytes that were expected have arrived.
DEVICE void barrier_set_up(SharedAddress barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and so many bytes are expected.
DEVICE void barrier_expect(SharedAddress barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of a phase; phases are 0, 1, 0, 1, ...
DEVICE void barrier_wait(SharedAddress barrier, u32 phase) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(barrier),
                 "r"(phase)
                 : "memory");
}

// Starts copying the tile from (row, column) on. What lies outside the matrix arrives as 0 and counts too.
DEVICE void copy_tile(SharedAddress to, const TensorMap* from, int row, int column, SharedAddress barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(from), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// The same in three dimensions.
DEVICE void copy_tile(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(from), "r"(column), "r"(row), "r"(layer), "r"(barrier)
                 : "memory");
}

// ---- products

typedef u64 WgmmaOperand;

// 16 columns of rows of 128 bytes from b on, which is a multiple of 32 bytes within a row.
DEVICE WgmmaOperand wgmma_operand(SharedAddress b) {
    const u32 eight_rows = 8 * 128, turned_128 = 1;
    return (u64)(b >> 4 & 0x3FFF | 1 << 16) | (u64)(eight_rows >> 4 | turned_128 << 30) << 32;
}

// Before the first product, and wherever registers were written since the last ones.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the products since the last call.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the youngest groups are still at work.
template <int pending> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// After a wait: keeps the compiler from reading sums before it.
DEVICE void wgmma_done(float (&d)[4]) { asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory"); }

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
#define SUMS_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_2(i) SUMS_1(i), SUMS_1(i + 1)
#define SUMS_4(i) SUMS_2(i), SUMS_2(i + 2)
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)

// N = 8 * tiles, and the registers of d, a and b in their order.
#define WGMMA_TEXT(type, tiles, n, registers, a0, a1, a2, a3, b) \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", add, 1, 1, 0; }" \
                 : SUMS_##tiles(0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand) \
                 : "memory")
#define WGMMA_OF(type) \
    if constexpr (tiles == 2) WGMMA_TEXT(type, 2, 16, REGISTERS_8, 8, 9, 10, 11, 12); \
    if constexpr (tiles == 4) WGMMA_TEXT(type, 4, 32, REGISTERS_16, 16, 17, 18, 19, 20); \
    if constexpr (tiles == 8) WGMMA_TEXT(type, 8, 64, REGISTERS_32, 32, 33, 34, 35, 36); \
    if constexpr (tiles == 16) WGMMA_TEXT(type, 16, 128, REGISTERS_64, 64, 65, 66, 67, 68); \
    if constexpr (tiles == 32) WGMMA_TEXT(type, 32, 256, REGISTERS_128, 128, 129, 130, 131, 132)

// d[i] is a warp's part of the 16 rows and of tokens 8i .. 8i + 7, as mma.m16n8k16 has it. Subnormal float16 inputs count in full.
template <int tiles, bool bfloat> DEVICE void wgmma(float (*d)[4], const u32 (&a)[4], WgmmaOperand operand) {
    static_assert(tiles == 2 || tiles == 4 || tiles == 8 || tiles == 16 || tiles == 32, "other widths are not written out");
    if constexpr (bfloat) {
        WGMMA_OF("bf16");
    } else {
        WGMMA_OF("f16");
    }
}
#endif
