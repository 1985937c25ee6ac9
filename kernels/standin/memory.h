// Memory as the kernels use it: asynchronous copies, atomics, and what blocks hand to each other.
#pragma once

#include <unordered_map>

#include "fibers.h"

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace standin {

static u64 now; // counts fences and atomics
static std::unordered_map<const void*, u64> published; // address -> when its last store became visible

static void aligned(const void* p, size_t to, const char* what) {
    if ((uintptr_t)p % to) fail(std::string("misaligned ") + what);
}

static void forget_exchanges() {
    now = 0;
    published.clear();
}

// The stores of this thread become visible to whoever fences later.
static void publish() {
    Fiber& f = *current;
    now++;
    for (auto& s : f.stores) {
        memcpy(s.to, s.bytes, 16);
        published[s.to] = now;
    }
    f.stores.clear();
    f.seen = now;
}

} // namespace standin

static inline void __threadfence() {
    standin::maybe_yield();
    standin::publish();
}

template <class T> static inline T atomicAdd(T* p, T v) {
    standin::maybe_yield();
    T old = *p;
    *p = old + v;
    standin::current->asked = ++standin::now;
    standin::maybe_yield();
    return old;
}

template <class T> static inline T atomicExch(T* p, T v) {
    standin::maybe_yield();
    standin::current->asked = ++standin::now;
    return std::exchange(*p, v);
}

template <class T> static inline T __ldg(const T* p) { return *p; }

static inline uint4 load_streaming(const uint4* p) {
    standin::aligned(p, 16, "16-byte load");
    return *p;
}

// The store stays with its thread until the thread fences; until then the place holds NaNs for everyone else.
static inline void store_for_other_blocks(float4* p, float4 v) {
    standin::aligned(p, 16, "16-byte store");
    memset((void*)p, 0xFF, 16);
    standin::PendingStore s;
    s.to = p;
    memcpy(s.bytes, &v, 16);
    standin::current->stores.push_back(s);
}

// NaNs unless the writer fenced, and after that this thread (or one it met at a barrier) fenced after its last atomic.
static inline float4 load_from_other_blocks(const float4* p) {
    standin::aligned(p, 16, "16-byte load");
    auto found = standin::published.find(p);
    u64 seen = standin::current->seen;
    float4 v = *p;
    bool stale = found != standin::published.end() && (found->second > seen || standin::current->asked > seen);
    if (stale) memset((void*)&v, 0xFF, 16);
    return v;
}

typedef uintptr_t SharedAddress;
static inline SharedAddress shared_address(const void* p) { return (SharedAddress)p; }

// The destination holds NaNs from here until this thread waits for the copy's group.
static inline void copy_async(SharedAddress address, const void* source, int valid = 16) {
    void* shared = (void*)address;
    standin::aligned(shared, 16, "destination of an asynchronous copy");
    standin::aligned(source, 16, "source of an asynchronous copy");
    if (valid < 0 || valid > 16) standin::fail("an asynchronous copy of " + std::to_string(valid) + " bytes");
    memset(shared, 0xFF, 16);
    standin::current->open_copies.push_back({shared, source, valid});
}

static inline void copy_async_commit() {
    auto& f = *standin::current;
    f.copy_groups.push_back(std::move(f.open_copies));
    f.open_copies.clear();
}

template <int pending> static inline void copy_async_wait() {
    auto& groups = standin::current->copy_groups;
    while ((int)groups.size() > pending) {
        for (auto& c : groups.front()) {
            memcpy(c.to, c.from, c.valid);
            memset((char*)c.to + c.valid, 0, 16 - c.valid);
        }
        groups.erase(groups.begin());
    }
}
