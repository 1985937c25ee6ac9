// Memory as the kernels use it: asynchronous copies, atomics, and what blocks hand to each other.
#pragma once

#include "fibers.h"

namespace emulator {

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

void note_atomic() { current->asked = ++now; }

void wait_for_copies(int pending) {
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
    emulator::publish();
}

uint4 load_streaming(const uint4* p) {
    emulator::aligned(p, 16, "16-byte load");
    return *p;
}

// The store stays with its thread until the thread fences; until then the place holds NaNs for everyone else.
void store_for_other_blocks(float4* p, float4 v) {
    emulator::aligned(p, 16, "16-byte store");
    memset((void*)p, 0xFF, 16);
    emulator::PendingStore s;
    s.to = p;
    memcpy(s.bytes, &v, 16);
    emulator::current->stores.push_back(s);
}

// NaNs unless the writer fenced, and after that this thread (or one it met at a barrier) fenced after its last atomic.
float4 load_from_other_blocks(const float4* p) {
    emulator::aligned(p, 16, "16-byte load");
    auto found = emulator::published.find(p);
    u64 seen = emulator::current->seen;
    float4 v = *p;
    bool stale = found != emulator::published.end() && (found->second > seen || emulator::current->asked > seen);
    if (stale) memset((void*)&v, 0xFF, 16);
    return v;
}

// The destination holds NaNs from here until this thread waits for the copy's group.
void copy_async(SharedAddress address, const void* source, int valid) {
    void* shared = (void*)address;
    emulator::aligned(shared, 16, "destination of an asynchronous copy");
    emulator::aligned(source, 16, "source of an asynchronous copy");
    if (valid < 0 || valid > 16) emulator::fail("an asynchronous copy of " + std::to_string(valid) + " bytes");
    memset(shared, 0xFF, 16);
    emulator::current->open_copies.push_back({shared, source, valid});
}

void copy_async_commit() {
    auto& f = *emulator::current;
    f.copy_groups.push_back(std::move(f.open_copies));
    f.open_copies.clear();
}
