// cp.async copies, fences, atomics, and data exchange between blocks.
#pragma once

#include "fibers.h"

namespace emulator {

static u64 now;                                           // logical time: counts fences and atomics
static std::unordered_map<const void*, u64> visible_since; // address -> time at which its last store was published

static void check_aligned(const void* p, size_t alignment, const char* what) {
    if ((uintptr_t)p % alignment) fail(std::string("misaligned ") + what);
}

static void reset_visibility() {
    now = 0;
    visible_since.clear();
}

// Make this thread's stores visible to threads that fence later.
static void publish_stores() {
    Fiber& f = *current;
    now++;
    for (auto& s : f.stores) {
        memcpy(s.to, s.bytes, 16);
        visible_since[s.to] = now;
    }
    f.stores.clear();
    f.last_fence = now;
}

void record_atomic() { current->last_atomic = ++now; }

void wait_for_cp_async(int pending) {
    auto& groups = current->copy_groups;
    while ((int)groups.size() > pending) {
        for (auto& c : groups.front()) {
            memcpy(c.to, c.from, c.valid);
            memset((char*)c.to + c.valid, 0, 16 - c.valid);
        }
        groups.erase(groups.begin());
    }
}

unsigned char* shared_memory() { return current->block->shared; }

} // namespace emulator

void __threadfence() {
    emulator::maybe_yield();
    emulator::publish_stores();
}

uint4 load_streaming(const uint4* p) {
    emulator::check_aligned(p, 16, "16-byte load");
    return *p;
}

// Keep the store in its thread until a fence. Until then all other threads read NaNs.
void store_cg(float4* p, float4 v) {
    emulator::check_aligned(p, 16, "16-byte store");
    memset((void*)p, 0xFF, 16);
    emulator::PendingStore s;
    s.to = p;
    memcpy(s.bytes, &v, 16);
    emulator::current->stores.push_back(s);
}

// NaNs, unless the writer fenced, and this thread (or one that it synchronized with) fenced after that and after its last atomic.
float4 load_cg(const float4* p) {
    emulator::check_aligned(p, 16, "16-byte load");
    auto found = emulator::visible_since.find(p);
    u64 fence = emulator::current->last_fence;
    float4 v = *p;
    bool stale = found != emulator::visible_since.end() && (found->second > fence || emulator::current->last_atomic > fence);
    if (stale) memset((void*)&v, 0xFF, 16);
    return v;
}

// The destination holds NaNs until this thread waits for the copy's group.
void cp_async(SharedAddress address, const void* source, int valid) {
    void* shared = (void*)address;
    emulator::check_aligned(shared, 16, "destination of cp.async");
    emulator::check_aligned(source, 16, "source of cp.async");
    if (valid < 0 || valid > 16) emulator::fail("cp.async of " + std::to_string(valid) + " bytes; 0 to 16 are possible");
    memset(shared, 0xFF, 16);
    emulator::current->open_copies.push_back({shared, source, valid});
}

void cp_async_commit() {
    auto& f = *emulator::current;
    f.copy_groups.push_back(std::move(f.open_copies));
    f.open_copies.clear();
}
