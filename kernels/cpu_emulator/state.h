// State of an emulated launch: blocks, warps, threads, and their pending asynchronous operations.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulator.h"

namespace emulator {

// Store by store_cg that its thread has not yet published with a fence.
struct PendingStore { void* to; unsigned char bytes[16]; };
struct PendingCopy { void* to; const void* from; int valid; };

// One warp's operands of a WGMMA: its rows of a, and a copy of b at the time of issue.
struct WgmmaOperands {
    float a[16][16];
    WgmmaDescriptor b;
    int tiles;
    bool bfloat;
    std::vector<u16> b_at_issue; // [token][16]
};

// WGMMA that was issued and not yet waited for, as one lane sees it.
struct PendingWgmma {
    std::shared_ptr<const WgmmaOperands> operands;
    float (*d)[4];
    const u32* a;
    u32 a_at_issue[4];
};

// Accumulators of pending WGMMAs. Their registers hold NaNs until the wait.
struct PendingAccumulators {
    float (*registers)[4];
    int pending;
    std::vector<float> values;
};

// Operation of several lanes of one warp: every lane stores its operands, the last one to arrive computes for all.
struct WarpCollective {
    u32 mask = 0, arrived = 0, generation = 0;
    const char* operation = "";
    u32 in[32][10];
    u32 out[32][4];
    const void* address[32];
    std::shared_ptr<const WgmmaOperands> operands;
};

// Barrier of several threads of a block. It also exchanges their fence and atomic times.
struct Barrier {
    u32 arrived = 0, generation = 0;
    u64 last_fence = 0, last_atomic = 0;
};

// TMA load whose destination holds NaNs until its mbarrier completes a phase.
struct PendingTmaLoad {
    u64 bytes;
    std::function<void()> copy;
};

struct Mbarrier {
    u32 expected_arrivals = 1;
    u32 completed_phases = 0;
    u32 events = 0;  // loads and arrivals so far; waiting threads resume when it changes
    u32 arrived = 0; // in the current phase
    u64 expected_bytes = 0;
    std::vector<PendingTmaLoad> loads;
};

struct Block;

// One CUDA thread.
struct Fiber {
    Block* block = nullptr;
    u32 thread = 0;
    bool finished = false;
    const u32* blocked_on = nullptr; // runnable when *blocked_on differs from blocked_value
    u32 blocked_value = 0;
    const char* blocked_at = "";
    u64 last_fence = 0;  // of this thread, or of one that it synchronized with: stores published before are visible
    bool in_cluster_barrier = false; // has arrived and not waited
    u32 cluster_generation = 0;      // of the barrier at that arrival
    bool cluster_begun = false;      // has waited once
    u64 last_atomic = 0; // likewise; data learned through the atomic requires a later fence
    std::vector<PendingStore> stores;
    std::vector<PendingCopy> open_copies;
    std::vector<std::vector<PendingCopy>> copy_groups;
    bool wgmma_fenced = false; // a wgmma_fence followed the last wait
    std::vector<PendingWgmma> open_wgmmas;
    std::vector<std::vector<PendingWgmma>> wgmma_groups;
    std::vector<PendingAccumulators> accumulators;
    std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Warp {
    std::vector<std::unique_ptr<WarpCollective>> collectives;
    u32 period = 1; // runs in one of so many scheduling rounds
};

// Blocks that can read each other's shared memory.
struct Cluster {
    std::vector<Block*> blocks;
    Barrier barrier;

    u32 alive() const;
};

struct Block {
    uint3 index;
    u32 alive = 0;
    std::shared_ptr<Cluster> cluster;
    Barrier barriers[16];  // 0 is __syncthreads
    Barrier warpgroups[8]; // wgmma_fence synchronizes the four warps of a warpgroup
    std::unordered_map<SharedAddress, Mbarrier> mbarriers;
    unsigned char* shared = nullptr;
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<Fiber>> fibers;
};

inline u32 Cluster::alive() const {
    u32 threads = 0;
    for (const Block* b : blocks) threads += b->alive;
    return threads;
}

static Fiber* current; // the running thread

} // namespace emulator
