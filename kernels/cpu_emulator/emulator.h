// A CPU stand-in for the device: the very source of a kernel, compiled as C++ with EMULATOR defined, runs on this.
//
// What it checks beyond results: operations of a warp that not all its lanes reach together, barriers that not all threads
// reach (deadlock), asynchronous copies read before they were waited for (their destination holds NaNs until then) or never
// waited for, shared memory read before it was written (NaNs), misaligned 16-byte accesses, a missing fence on
// either side of an exchange between blocks (store_for_other_blocks), products of four warps whose registers or shared memory are
// touched before they were waited for or whose fences are missing, barriers that get other bytes than they expect, and, built with the address sanitizer, any access
// outside a buffer. A seed shuffles the order of threads and blocks.
//
// What it cannot show: speed; races between plain accesses that no tried order brings to light (a thread runs on until it
// waits, so interleavings are coarse); the tensor cores' own rounding (sums here are in order, in float32); contraction of
// a*b+c to fused multiply-add; registers, banks and everything else of the compiler for the device.
//
// Kernels see only this header; the runtime behind it (fibers.h, memory.h, warp.h, hopper.h) is compiled once, as runtime.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#undef UNROLL
#define UNROLL
#define DEVICE static inline
#define DEVICE_MEMBER
#define DEVICE_CONSTANT
#define KERNEL static
#define LAUNCH_BOUNDS(threads, blocks_per_sm)
#define GRID_CONSTANT
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory()
#define __restrict__ __restrict

struct uint3 { u32 x, y, z; };
struct dim3 { u32 x, y, z; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim, blockDim;

namespace emulator {
u32 lane();
unsigned char* shared_memory();
const float* half_table();                                                // the value of each float16
u32 shuffle(u32 mask, u32 value, u32 source, const char* operation);
void wait_for_copies(int pending);
void maybe_yield(); // lets other threads run first, now and then: what a seed may place between two operations on memory
void note_atomic(); // what this thread learns from an atomic is not to be relied on without a fence after it
} // namespace emulator

// ---- threads and warps

void __syncthreads();
void named_barrier(int id, int threads);
void __syncwarp(u32 mask = ~0u);
u32 __ballot_sync(u32 mask, int predicate);
static inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace emulator {
template <class T> static T shuffle_any(u32 mask, T value, int source, const char* operation) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    u32 bits;
    memcpy(&bits, &value, 4);
    bits = shuffle(mask, bits, (u32)source, operation);
    memcpy(&value, &bits, 4);
    return value;
}
} // namespace emulator

template <class T> static inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
    int lane = (int)emulator::lane();
    return emulator::shuffle_any(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T> static inline T __shfl_xor_sync(u32 mask, T value, int lanes, int width = 32) {
    int lane = (int)emulator::lane(), source = lane ^ lanes;
    return emulator::shuffle_any(mask, value, source / width > lane / width ? lane : source, "__shfl_xor_sync");
}
template <class T> static inline T __shfl_down_sync(u32 mask, T value, u32 lanes, int width = 32) {
    int lane = (int)emulator::lane(), source = lane + (int)lanes;
    return emulator::shuffle_any(mask, value, source / width > lane / width ? lane : source, "__shfl_down_sync");
}
template <class T> static inline T __shfl_up_sync(u32 mask, T value, u32 lanes, int width = 32) {
    int lane = (int)emulator::lane(), source = lane - (int)lanes;
    return emulator::shuffle_any(mask, value, source < (lane & ~(width - 1)) ? lane : source, "__shfl_up_sync");
}

typedef uintptr_t SharedAddress;
static inline SharedAddress shared_address(const void* p) { return (SharedAddress)p; }
void load_matrices(u32 (&r)[4], SharedAddress row);
void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]);
void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]);

// ---- what sm_90a alone has (hopper.cuh)

template <int registers> static inline void keep_registers() {}
template <int registers> static inline void take_registers() {}

constexpr int tile_alignment = 1024;

// Sizes and tiles: of layers, rows and columns. turned: rows of 128 bytes have their pieces in the order that wgmma wants.
struct alignas(64) TensorMap {
    const char* elements;
    u32 element_bytes, sizes[3], tile[3], turned, unused[22];
};
void barrier_set_up(SharedAddress barrier, u32 arrivals);
void barrier_arrive(SharedAddress barrier);
void barrier_expect(SharedAddress barrier, u32 bytes);
void barrier_wait(SharedAddress barrier, u32 phase);
void copy_tile(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier);
static inline void copy_tile(SharedAddress to, const TensorMap* from, int row, int column, SharedAddress barrier) {
    copy_tile(to, from, 0, row, column, barrier);
}

typedef SharedAddress WgmmaOperand;
static inline WgmmaOperand wgmma_operand(SharedAddress b) { return b; }
void wgmma_fence();
void wgmma_commit();
static inline void wgmma_done(float (&)[4]) {}
namespace emulator {
void wait_for_products(int pending);
void start_product(float (*d)[4], const u32* a, WgmmaOperand operand, int tiles, bool bfloat);
} // namespace emulator
template <int pending> static inline void wgmma_wait() { emulator::wait_for_products(pending); }
template <int tiles, bool bfloat> static inline void wgmma(float (*d)[4], const u32 (&a)[4], WgmmaOperand operand) {
    emulator::start_product(d, a, operand, tiles, bfloat);
}

// ---- memory

void __threadfence();
static inline void device_fence() { __threadfence(); }
uint4 load_streaming(const uint4* p);
void store_for_other_blocks(float4* p, float4 v);
float4 load_from_other_blocks(const float4* p);
void copy_async(SharedAddress shared, const void* source, int valid = 16);
void copy_async_commit();
template <int pending> static inline void copy_async_wait() { emulator::wait_for_copies(pending); }

static inline void prefetch(const void*) {}
static inline void wait_for_earlier_kernels() {} // one launch at a time here
static inline void let_next_kernel_begin() {}

template <class T> static inline T atomicAdd(T* p, T v) {
    emulator::maybe_yield();
    T old = *p;
    *p = old + v;
    emulator::note_atomic();
    return old;
}
template <class T> static inline T atomicExch(T* p, T v) {
    emulator::maybe_yield();
    emulator::note_atomic();
    return std::exchange(*p, v);
}
template <class T> static inline T __ldg(const T* p) { return *p; }

// ---- numbers

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

static inline u32 opaque(u32 a) { return a; }
static inline float reciprocal(float f) { return 1.0f / f; }
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

static inline float half_to_float(u16 bits) { return emulator::half_table()[bits]; }
static inline float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

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

static inline u32 floats_to_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
static inline u32 floats_to_bfloats(float low, float high) { return float_to_bfloat(low) | (u32)float_to_bfloat(high) << 16; }
static inline u32 fma_halves(u32 a, u32 b, u32 c) {
    auto one = [&](int by) { return fmaf(half_to_float((u16)(a >> by)), half_to_float((u16)(b >> by)), half_to_float((u16)(c >> by))); };
    return floats_to_halves(one(0), one(16));
}
static inline u32 fma_bfloats(u32 a, u32 b, u32 c) {
    auto one = [&](int by) { return fmaf(bfloat_to_float((u16)(a >> by)), bfloat_to_float((u16)(b >> by)), bfloat_to_float((u16)(c >> by))); };
    return floats_to_bfloats(one(0), one(16));
}
