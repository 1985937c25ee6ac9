// Scheduler: every CUDA thread is a fiber (a stack of its own and a manual context switch), and one core runs all fibers of a grid.
//
// A fiber runs until it blocks at a barrier or at a warp-level operation, or yields at a memory operation. Up to kResidentBlocks blocks are
// resident at once. Seed 0 runs threads and blocks in order. Any other seed shuffles both, and makes some warps run far less often than
// others.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 gridDim, blockDim;

namespace emulator {

const size_t kStackBytes = 128 << 10;
const u32 kResidentBlocks = 3; // or a cluster more
const u32 kSlowPeriod = 40; // of the slow warps of a shuffled schedule

static void (*entry)(void**);
static void** entry_arguments;
static std::string error;
static std::vector<PendingStore> unpublished_stores; // of threads that ended without a fence; visible after the launch
static std::mt19937 random_bits;
static bool shuffled;

// ---- context switch

#if defined(__x86_64__)
static void* scheduler_stack_pointer;
extern "C" void emulator_switch_stack(void** from, void* to);
asm(".text\n.globl emulator_switch_stack\n.hidden emulator_switch_stack\nemulator_switch_stack:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
static void switch_to_scheduler() { emulator_switch_stack(&current->stack_pointer, scheduler_stack_pointer); }
static void switch_to(Fiber& f) { emulator_switch_stack(&scheduler_stack_pointer, f.stack_pointer); }
static void prepare_stack(Fiber& f, void (*body)()) {
    void** top = (void**)((uintptr_t)(f.stack.get() + kStackBytes) & ~(uintptr_t)63);
    *--top = nullptr; // stack alignment at the entry of a called function
    *--top = (void*)body;
    f.stack_pointer = top - 6; // six callee-saved registers
}
#else
static ucontext_t scheduler_context;
static void switch_to_scheduler() { swapcontext(&current->context, &scheduler_context); }
static void switch_to(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
static void prepare_stack(Fiber& f, void (*body)()) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
}
#endif

// ---- blocking and errors

static std::string location() {
    return current == nullptr ? std::string("launch")
                              : "block (" + std::to_string(current->block->index.x) + ", " + std::to_string(current->block->index.y) +
                                    "), thread " + std::to_string(current->thread);
}

// Abort the launch with a message. Never returns to the kernel.
[[noreturn]] static void fail(const std::string& what) {
    if (error.empty()) error = location() + ": " + what;
    for (;;) switch_to_scheduler();
}

// Block the current thread until *counter differs from `value`.
static void wait(const u32* counter, u32 value, const char* where) {
    current->blocked_on = counter;
    current->blocked_value = value;
    current->blocked_at = where;
    switch_to_scheduler();
    current->blocked_on = nullptr;
}

void maybe_yield() {
    if (shuffled && random_bits() % 4 == 0) switch_to_scheduler();
}

static void release_if_complete(Barrier& b, u32 expected) {
    if (b.arrived == 0 || b.arrived < expected) return;
    b.arrived = 0;
    b.generation++;
}

static void arrive_and_wait(Barrier& b, u32 expected, const char* where) {
    if (b.arrived++ == 0) b.last_fence = b.last_atomic = 0;
    b.last_fence = std::max(b.last_fence, current->last_fence);
    b.last_atomic = std::max(b.last_atomic, current->last_atomic);
    u32 generation = b.generation;
    release_if_complete(b, expected);
    if (b.generation == generation) wait(&b.generation, generation, where);
    current->last_fence = std::max(current->last_fence, b.last_fence);
    current->last_atomic = std::max(current->last_atomic, b.last_atomic);
}

// ---- blocks and rounds

static void run_thread() {
    Fiber& f = *current;
    entry(entry_arguments);
    if (!f.open_copies.empty() || !f.copy_groups.empty()) fail("thread exits with pending cp.async copies");
    if (!f.open_wgmmas.empty() || !f.wgmma_groups.empty()) fail("thread exits with pending WGMMAs");
    unpublished_stores.insert(unpublished_stores.end(), f.stores.begin(), f.stores.end());
    f.finished = true;
    f.block->alive--;
    release_if_complete(f.block->barriers[0], f.block->alive);
    release_if_complete(f.block->cluster->barrier, f.block->cluster->alive());
    for (;;) switch_to_scheduler();
}

static std::unique_ptr<Block> start_block(uint3 index, u32 threads, size_t shared_bytes) {
    auto b = std::make_unique<Block>();
    b->index = index;
    b->alive = threads;
    b->warps.resize((threads + 31) / 32);
    if (shuffled)
        for (Warp& w : b->warps) w.period = random_bits() % 2 ? 1 : kSlowPeriod;
    // Exact size, so that the address sanitizer detects accesses beyond the end. Filled with NaNs.
    if (posix_memalign((void**)&b->shared, kSwizzleAlignment, std::max<size_t>(shared_bytes, 1))) abort();
    memset(b->shared, 0xFF, shared_bytes);
    for (u32 i = 0; i < threads; i++) {
        auto f = std::make_unique<Fiber>();
        f->block = b.get();
        f->thread = i;
        f->stack.reset(new char[kStackBytes]);
        prepare_stack(*f, run_thread);
        b->fibers.push_back(std::move(f));
    }
    return b;
}

static void resume(Fiber& f) {
    current = &f;
    threadIdx = {f.thread % blockDim.x, f.thread / blockDim.x, 0};
    blockIdx = f.block->index;
    switch_to(f);
    current = nullptr;
}

static bool runnable(const Fiber& f) { return !f.finished && (f.blocked_on == nullptr || *f.blocked_on != f.blocked_value); }

static std::string deadlock_message(const std::vector<std::unique_ptr<Block>>& blocks) {
    std::string message = "deadlock:";
    for (auto& b : blocks)
        for (auto& f : b->fibers)
            if (!f->finished && message.size() < 400)
                message += " [block " + std::to_string(b->index.x) + " thread " + std::to_string(f->thread) + " at " + f->blocked_at + "]";
    return message;
}

// Run every runnable fiber of the resident blocks once, if its warp's period divides `round`. Round 0 includes every warp. Return false if
// no fiber ran.
static bool run_round(std::vector<std::unique_ptr<Block>>& blocks, u32 round) {
    std::vector<Fiber*> order;
    for (auto& b : blocks)
        for (auto& f : b->fibers)
            if (!f->finished && round % b->warps[f->thread / 32].period == 0) order.push_back(f.get());
    if (shuffled) std::shuffle(order.begin(), order.end(), random_bits);
    bool progress = false;
    for (Fiber* f : order) {
        if (!runnable(*f)) continue;
        resume(*f);
        progress = true;
        if (!error.empty()) return true;
    }
    return progress;
}

// Indices of the first blocks of all clusters; the last one starts first.
static std::vector<uint3> cluster_order(dim3 grid, u32 cluster) {
    std::vector<uint3> order;
    for (u32 z = 0; z < grid.z; z++)
        for (u32 y = 0; y < grid.y; y++)
            for (u32 x = 0; x < grid.x; x += cluster) order.push_back({x, y, z});
    if (shuffled) std::shuffle(order.begin(), order.end(), random_bits);
    std::reverse(order.begin(), order.end());
    return order;
}

static void start_cluster(std::vector<std::unique_ptr<Block>>& blocks, uint3 first, u32 size, u32 threads, size_t shared_bytes) {
    auto cluster = std::make_shared<Cluster>();
    for (u32 i = 0; i < size; i++) {
        blocks.push_back(start_block({first.x + i, first.y, first.z}, threads, shared_bytes));
        blocks.back()->cluster = cluster;
        cluster->blocks.push_back(blocks.back().get());
    }
}

// Run a grid. Return the error message, empty on success.
static std::string run_grid(dim3 grid, dim3 block, u32 cluster, size_t shared_bytes, u32 seed, void (*e)(void**), void** arguments) {
    entry = e;
    entry_arguments = arguments;
    gridDim = grid;
    blockDim = block;
    error.clear();
    unpublished_stores.clear();
    random_bits.seed(seed);
    shuffled = seed != 0;
    if (grid.x % cluster) return "the grid has " + std::to_string(grid.x) + " blocks, no multiple of the cluster's " + std::to_string(cluster);
    std::vector<uint3> queue = cluster_order(grid, cluster);
    std::vector<std::unique_ptr<Block>> blocks;
    u32 round = 0;
    while (error.empty() && (!queue.empty() || !blocks.empty())) {
        while (!queue.empty() && blocks.size() < kResidentBlocks) {
            start_cluster(blocks, queue.back(), cluster, block.x * block.y * block.z, shared_bytes);
            queue.pop_back();
        }
        if (!run_round(blocks, round++) && !run_round(blocks, 0) && error.empty()) error = deadlock_message(blocks);
        for (auto& b : blocks)
            if (b->cluster->alive() == 0 || !error.empty()) free(std::exchange(b->shared, nullptr));
        auto ended = [](auto& b) { return b->shared == nullptr; };
        blocks.erase(std::remove_if(blocks.begin(), blocks.end(), ended), blocks.end());
    }
    for (auto& s : unpublished_stores) memcpy(s.to, s.bytes, 16);
    return error;
}

} // namespace emulator

void __syncthreads() {
    emulator::Block& block = *emulator::current->block;
    emulator::arrive_and_wait(block.barriers[0], block.alive, "__syncthreads");
}

void named_barrier_sync(int id, int threads) {
    if (id < 1 || id > 15 || threads % 32) emulator::fail("named barrier: id must be in 1..15 and threads a multiple of 32");
    emulator::arrive_and_wait(emulator::current->block->barriers[id], (u32)threads, "named_barrier_sync");
}

void cluster_arrive_relaxed() {
    using namespace emulator;
    if (current->in_cluster_barrier) fail("arrival at the cluster's barrier without a wait for the arrival before");
    Barrier& barrier = current->block->cluster->barrier;
    current->in_cluster_barrier = true;
    current->cluster_generation = barrier.generation;
    barrier.arrived++;
    release_if_complete(barrier, current->block->cluster->alive());
}

void cluster_wait() {
    using namespace emulator;
    if (!current->in_cluster_barrier) fail("cluster_wait without an arrival");
    const u32* generation = &current->block->cluster->barrier.generation;
    if (*generation == current->cluster_generation) wait(generation, current->cluster_generation, "cluster_wait");
    current->in_cluster_barrier = false;
    current->cluster_begun = true;
}
