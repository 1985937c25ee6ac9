// A CPU stand-in for the device: the very source of a kernel, compiled as C++ with STANDIN defined, runs on this.
//
// What it checks beyond results: operations of a warp that not all its lanes reach together, barriers that not all threads
// reach (deadlock), asynchronous copies read before they were waited for (their destination holds NaNs until then) or never
// waited for, shared memory read before it was written (NaNs), misaligned 16-byte accesses, a missing __threadfence() on
// either side of an exchange between blocks (store_for_other_blocks), and, built with the address sanitizer, any access
// outside a buffer. A seed shuffles the order of threads and blocks.
//
// What it cannot show: speed; races between plain accesses that no tried order brings to light (a thread runs on until it
// waits, so interleavings are coarse); the tensor cores' own rounding (sums here are in order, in float32); contraction of a*b+c to
// fused multiply-add; registers, banks and everything else of the compiler for the device.
#pragma once

#include <cmath>

#include "fibers.h"
#include "memory.h"
#include "warp.h"

#undef UNROLL
#define UNROLL
#define DEVICE static inline
#define DEVICE_MEMBER
#define DEVICE_CONSTANT
#define KERNEL static
#define LAUNCH_BOUNDS(threads, blocks_per_sm)
#define SHARED_MEMORY(name) unsigned char* name = standin::current->block->shared
#define __restrict__ __restrict

using std::max;
using std::min;

static inline u32 bit_select(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }
static inline u32 and_or(u32 a, u32 mask, u32 b) { return (a & mask) | b; }
static inline u32 rotate_right(u32 a, int by) { return by & 31 ? a >> (by & 31) | a << (32 - (by & 31)) : a; }
static inline int __popc(u32 a) { return __builtin_popcount(a); }

static inline float __uint_as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline u32 __float_as_uint(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
static inline float __int_as_float(int bits) { return __uint_as_float((u32)bits); }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline int __float2int_rn(float f) { return (int)std::nearbyintf(f); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float f) { return 1.0f / std::sqrt(f); }

static inline float half_to_float(u16 bits) { return standin::half_table()[bits]; }
static inline float bfloat_to_float(u16 bits) { return standin::bfloat_value(bits); }

static inline u16 float_to_half(float f) {
    _Float16 h = (_Float16)f;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}

// To the nearest, ties to even.
static inline u16 float_to_bfloat(float f) {
    u32 bits = __float_as_uint(f);
    if (f != f) return 0x7FFF;
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

namespace standin {

// Calls a kernel with its arguments given as cuLaunchKernel takes them: one pointer to each.
template <class... P, size_t... i> static void call(void (*kernel)(P...), void** arguments, std::index_sequence<i...>) {
    kernel(*(std::remove_cv_t<std::remove_reference_t<P>>*)arguments[i]...);
}
template <class... P> static void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>{});
}
template <class... P> static constexpr int parameters(void (*)(P...)) { return sizeof...(P); }
template <class... P> static void sizes(void (*)(P...), int* bytes) { ((*bytes++ = sizeof(P)), ...); }

} // namespace standin
