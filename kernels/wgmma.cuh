// The tensor cores of sm_90a as four warps use them together (PTX ISA, "Asynchronous warpgroup level matrix instructions").
//
// d += a b for a [64, 16] in the registers of the four warps, 16 rows of each in the fragments of mma.m16n8k16, and b [16, N] in
// shared memory as [N, 16], in pieces of 8 x 8 elements of 128 bytes. The instruction returns at once: until it was waited for,
// its registers must not be touched and its shared memory must not be written.
#pragma once
#include "device.cuh"

#ifndef STANDIN // which declares the same

typedef u64 WgmmaOperand;

// Where b is. From piece to piece: `columns_apart` bytes along the 16, `tokens_apart` along the N.
DEVICE WgmmaOperand wgmma_operand(SharedAddress b, int columns_apart, int tokens_apart) {
    return (u64)((u32)columns_apart >> 4 << 16 | b >> 4) | (u64)(u32)(tokens_apart >> 4) << 32;
}

// Before the first product, and wherever registers were written since the last ones.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the products since the last call.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the youngest groups are still at work.
template <int pending> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// After a wait: keeps the compiler from reading sums before it.
DEVICE void wgmma_done(float (&d)[4]) { asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory"); }

// By each thread whose copies to shared memory have arrived, before it meets those that multiply them: the tensor cores read past
// the caches that ordinary accesses go through.
DEVICE void fence_for_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define REGISTERS_4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define REGISTERS_8 REGISTERS_4(0, 1, 2, 3) ", " REGISTERS_4(4, 5, 6, 7)
#define REGISTERS_16 REGISTERS_8 ", " REGISTERS_4(8, 9, 10, 11) ", " REGISTERS_4(12, 13, 14, 15)
#define REGISTERS_32 \
    REGISTERS_16 ", " REGISTERS_4(16, 17, 18, 19) ", " REGISTERS_4(20, 21, 22, 23) ", " REGISTERS_4(24, 25, 26, 27) ", " REGISTERS_4(28, 29, 30, 31)
#define REGISTERS_64 \
    REGISTERS_32 ", " REGISTERS_4(32, 33, 34, 35) ", " REGISTERS_4(36, 37, 38, 39) ", " REGISTERS_4(40, 41, 42, 43) ", " \
    REGISTERS_4(44, 45, 46, 47) ", " REGISTERS_4(48, 49, 50, 51) ", " REGISTERS_4(52, 53, 54, 55) ", " REGISTERS_4(56, 57, 58, 59) ", " \
    REGISTERS_4(60, 61, 62, 63)
#define SUMS_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_2(i) SUMS_1(i), SUMS_1(i + 1)
#define SUMS_4(i) SUMS_2(i), SUMS_2(i + 2)
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)

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
    if constexpr (tiles == 16) WGMMA_TEXT(type, 16, 128, REGISTERS_64, 64, 65, 66, 67, 68)

// d[i] is a warp's part of the 16 rows and of tokens 8i .. 8i + 7, as mma.m16n8k16 has it. Subnormal float16 inputs count in full.
template <int tiles, bool bfloat> DEVICE void wgmma(float (*d)[4], const u32 (&a)[4], WgmmaOperand operand) {
    static_assert(tiles == 2 || tiles == 4 || tiles == 8 || tiles == 16, "other widths are not written out");
    if constexpr (bfloat) {
        WGMMA_OF("bf16");
    } else {
        WGMMA_OF("f16");
    }
}
#endif
