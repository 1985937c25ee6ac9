// CPU emulator of a CUDA device: an unmodified kernel source, compiled as C++ with EMULATOR defined, runs on it.
//
// Errors that it detects besides wrong results:
//   - warp-level operations that not all lanes of the mask reach together, and barriers that not all threads reach (deadlock)
//   - cp.async and TMA destinations read before the wait (they hold NaNs until then), copies without a wait
//   - uninitialized shared memory (NaNs), misaligned 16-byte accesses
//   - distributed shared memory of a block that the cluster has not waited for, or that has exited
//   - a missing fence on either side of an exchange between blocks (store_cg, load_cg)
//   - WGMMA: registers or shared memory accessed before the wait, missing fences
//   - mbarriers that receive more bytes than expected, or too many arrivals
//   - accesses outside a buffer, when built with the address sanitizer
// A seed shuffles the order of threads and blocks.
//
// Not covered: speed; races between plain accesses that none of the tried orders exposes (a thread runs until it blocks, so interleavings
// are coarse); rounding inside the tensor cores (the emulator sums in order, in float32); contraction of a * b + c to fused
// multiply-add; register allocation, bank conflicts and everything else that the device compiler decides.
//
// Kernels include this header only. The runtime (fibers.h, memory.h, warp.h, hopper.h) is compiled once, as runtime.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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
#define CLUSTER_DIMS(blocks)
#define GRID_CONSTANT
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory()

struct uint3 { u32 x, y, z; };
struct dim3 { u32 x, y, z; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim, blockDim;

namespace emulator {
u32 lane();
unsigned char* shared_memory();
const float* half_table(); // value of each of the 65536 float16 bit patterns
u32 shuffle(u32 mask, u32 value, u32 source, const char* operation);
void wait_for_cp_async(int pending);
void maybe_yield();   // with a seed: sometimes let other threads run between two memory operations
void record_atomic(); // data learned through an atomic requires a fence of this thread afterwards
} // namespace emulator

// ---- threads and warps

void __syncthreads();
void named_barrier_sync(int id, int threads);
void cluster_arrive_relaxed();
void cluster_wait();
void __syncwarp(u32 mask = ~0u);
u32 __ballot_sync(u32 mask, int predicate);
static inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

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

typedef uintptr_t SharedAddress;
static inline SharedAddress shared_address(const void* p) { return (SharedAddress)p; }
void ldmatrix_x4(u32 (&r)[4], SharedAddress row);
static inline u32 transpose_8x8(u32 pair) {
    const int lane = (int)emulator::lane(), row = lane / 4, column = 2 * (lane % 4); // of the result
    const u32 first = emulator::shuffle_any(~0u, pair, 4 * column + row / 2, "transpose_8x8");
    const u32 second = emulator::shuffle_any(~0u, pair, 4 * (column + 1) + row / 2, "transpose_8x8");
    return (row % 2 ? first >> 16 : first & 0xFFFF) | (row % 2 ? second & 0xFFFF0000 : second << 16);
}
void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]);
void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]);

// ---- sm_90a (hopper.cuh)

template <int registers> static inline void warpgroup_reg_dealloc() {}
template <int registers> static inline void warpgroup_reg_alloc() {}

constexpr int kSwizzleAlignment = 1024;

// TMA descriptor. sizes and box: layers, rows, columns. strides: of a layer and of a row, in elements. swizzled: 128-byte swizzle.
struct alignas(64) TensorMap {
    const char* elements;
    u32 element_bytes, sizes[3], box[3], swizzled;
    u64 strides[2];
    u32 unused[18];
};
void mbarrier_init(SharedAddress barrier, u32 arrivals);
void mbarrier_arrive(SharedAddress barrier);
void mbarrier_arrive_expect_tx(SharedAddress barrier, u32 bytes);
void mbarrier_wait(SharedAddress barrier, u32 parity);
void mbarrier_wait_cluster(SharedAddress barrier, u32 parity);
void tma_load_3d(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier);
static inline void tma_load_2d(SharedAddress to, const TensorMap* from, int row, int column, SharedAddress barrier) {
    tma_load_3d(to, from, 0, row, column, barrier);
}

typedef SharedAddress WgmmaDescriptor;
static inline WgmmaDescriptor wgmma_descriptor(SharedAddress b) { return b; }
void wgmma_fence();
void wgmma_commit();
static inline void warpgroup_fence_operand(float (&)[4]) {}
namespace emulator {
void wait_for_wgmma(int pending);
void issue_wgmma(float (*d)[4], const u32* a, WgmmaDescriptor b, int tiles, bool bfloat);
} // namespace emulator
template <int pending> static inline void wgmma_wait() { emulator::wait_for_wgmma(pending); }
template <int tiles, bool bfloat> static inline void wgmma(float (*d)[4], const u32 (&a)[4], WgmmaDescriptor b) {
    emulator::issue_wgmma(d, a, b, tiles, bfloat);
}

// ---- memory

void __threadfence();
static inline void fence_acq_rel_gpu() { __threadfence(); }
uint4 load_streaming(const uint4* p);
void store_cg(float4* p, float4 v);
float4 load_cg(const float4* p);
void store_cluster_async(SharedAddress address, SharedAddress barrier, u32 rank, float4 v);
void cp_async(SharedAddress shared, const void* source, int valid = 16);
void cp_async_commit();
template <int pending> static inline void cp_async_wait() { emulator::wait_for_cp_async(pending); }

static inline void prefetch_l2(const void*) {}
static inline void pdl_wait() {} // launches do not overlap here
static inline void pdl_launch_dependents() {}

template <class T> static inline T atomicAdd(T* p, T v) {
    emulator::maybe_yield();
    T old = *p;
    *p = old + v;
    emulator::record_atomic();
    return old;
}
template <class T> static inline T __ldg(const T* p) { return *p; }

// ---- numbers

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

static inline u32 opaque(u32 a) { return a; }
static inline float reciprocal_approx(float f) { return 1.0f / f; }
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

static inline float half_to_float(u16 bits) { return emulator::half_table()[bits]; }
static inline float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

static inline u16 float_to_half(float f) {
    _Float16 h = (_Float16)f;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}

// Round to nearest, ties to even.
static inline u16 float_to_bfloat(float f) {
    u32 bits = __float_as_uint(f);
    if (f != f) return 0x7FFF;
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline u32 floats_to_half2(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
static inline u32 floats_to_bfloat2(float low, float high) { return float_to_bfloat(low) | (u32)float_to_bfloat(high) << 16; }
static inline u32 fma_half2(u32 a, u32 b, u32 c) {
    auto one = [&](int by) { return fmaf(half_to_float((u16)(a >> by)), half_to_float((u16)(b >> by)), half_to_float((u16)(c >> by))); };
    return floats_to_half2(one(0), one(16));
}
static inline u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    auto one = [&](int by) { return fmaf(bfloat_to_float((u16)(a >> by)), bfloat_to_float((u16)(b >> by)), bfloat_to_float((u16)(c >> by))); };
    return floats_to_bfloat2(one(0), one(16));
}
