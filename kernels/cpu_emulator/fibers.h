// One fiber (a stack of its own, switched by hand) per CUDA thread, and the scheduler that runs a grid of them on one core.
//
// A fiber runs until it waits: at a barrier, at an operation of its whole warp, or now and then at an atomic. Up to
// `resident_blocks` blocks are in flight at once. Seed 0 runs threads and blocks in order; any other seed shuffles both, and lets
// some warps run far less often than others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulator.h"

uint3 threadIdx, blockIdx;
dim3 gridDim, blockDim;

namespace emulator {

const size_t stack_bytes = 128 << 10;
const u32 resident_blocks = 3;
const u64 never = ~0ull;

// A store made with store_for_other_blocks that its thread has not yet published with a fence.
struct PendingStore { void* to; unsigned char bytes[16]; };
struct PendingCopy { void* to; const void* from; int valid; };

// What the four warps of a wgmma multiply, as far as a warp needs it: its rows of a, and what b was when the product began.
struct Factors {
    float a[16][16];
    WgmmaOperand b;
    int tiles;
    bool bfloat;
    std::vector<u16> b_then; // [token][16]
};

// A product that was started and not yet waited for, in the eyes of one lane.
struct Product {
    std::shared_ptr<const Factors> factors;
    float (*sums)[4];
    const u32* a;
    u32 a_then[4];
};

// Sums that the tensor cores are adding to: their thread sees NaNs meanwhile.
struct SumsAtWork {
    float (*place)[4];
    int products;
    std::vector<float> values;
};

// Where lanes of one warp meet: each leaves its operands, the last to come computes for all, then all go on.
struct Meeting {
    u32 mask = 0, arrived = 0, generation = 0;
    const char* operation = "";
    u32 in[32][10];
    u32 out[32][4];
    const void* address[32];
    std::shared_ptr<const Factors> factors;
};

// Where threads of a block wait for each other; they then know of each other's fences and atomics.
struct Barrier {
    u32 arrived = 0, generation = 0;
    u64 seen = 0, asked = 0;
};

// A copy on its way to shared memory, which holds NaNs until someone waits for its barrier.
struct PendingBytes {
    u64 bytes;
    std::function<void()> copy;
};

// A barrier in shared memory that counts arrivals and bytes.
struct BytesBarrier {
    u32 arrivals = 1; // that end a phase
    u32 phases = 0;   // that have ended
    u32 asked = 0;    // counts copies and arrivals
    u32 arrived = 0;  // in this phase
    u64 missing = 0;  // bytes that are expected
    std::vector<PendingBytes> copies;
};

struct Block;

struct Fiber {
    Block* block = nullptr;
    u32 thread = 0;
    bool finished = false;
    const u32* waits_for = nullptr; // goes on once *waits_for differs from waits_value
    u32 waits_value = 0;
    const char* waits_at = "";
    u64 seen = 0;  // when this thread, or one it met at a barrier since, last fenced: stores published before are visible
    u64 asked = 0; // likewise, when it last used an atomic: what that told is not to be relied on without a fence after it
    std::vector<PendingStore> stores;
    std::vector<PendingCopy> open_copies;
    std::vector<std::vector<PendingCopy>> copy_groups;
    bool may_multiply = false; // fenced since its registers were its own
    std::vector<Product> open_products;
    std::vector<std::vector<Product>> product_groups;
    std::vector<SumsAtWork> at_work;
    std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Warp {
    std::vector<std::unique_ptr<Meeting>> meetings;
    u32 pace = 1; // runs in one round of so many
};

struct Block {
    uint3 index;
    u32 alive = 0;
    Barrier barriers[16];   // 0 is __syncthreads
    Barrier warpgroups[8];  // where four warps begin products together
    std::unordered_map<SharedAddress, BytesBarrier> byte_barriers;
    unsigned char* shared = nullptr;
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<Fiber>> fibers;
};

static Fiber* current;
static void (*entry)(void**);
static void** entry_arguments;
static std::string error;
static std::vector<PendingStore> never_published; // stores whose thread ended without a fence: visible after the launch
static std::mt19937 random_bits;
static bool shuffled;

#if defined(__x86_64__)
static void* scheduler_stack_pointer;
extern "C" void emulator_switch(void** from, void* to);
asm(".text\n.globl emulator_switch\n.hidden emulator_switch\nemulator_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
static void to_scheduler() { emulator_switch(&current->stack_pointer, scheduler_stack_pointer); }
static void to_fiber(Fiber& f) { emulator_switch(&scheduler_stack_pointer, f.stack_pointer); }
static void prepare(Fiber& f, void (*body)()) {
    void** top = (void**)((uintptr_t)(f.stack.get() + stack_bytes) & ~(uintptr_t)63);
    *--top = nullptr; // so that body starts with the stack alignment of a called function
    *--top = (void*)body;
    f.stack_pointer = top - 6; // six callee-saved registers
}
#else
static ucontext_t scheduler_context;
static void to_scheduler() { swapcontext(&current->context, &scheduler_context); }
static void to_fiber(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
static void prepare(Fiber& f, void (*body)()) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
}
#endif

static std::string place() {
    return current == nullptr ? std::string("launch")
                              : "block (" + std::to_string(current->block->index.x) + ", " + std::to_string(current->block->index.y) +
                                    "), thread " + std::to_string(current->thread);
}

// Ends the launch with a message; never returns to the kernel.
[[noreturn]] static void fail(const std::string& what) {
    if (error.empty()) error = place() + ": " + what;
    for (;;) to_scheduler();
}

static void wait(const u32* counter, u32 value, const char* where) {
    current->waits_for = counter;
    current->waits_value = value;
    current->waits_at = where;
    to_scheduler();
    current->waits_for = nullptr;
}

void maybe_yield() {
    if (shuffled && random_bits() % 4 == 0) to_scheduler();
}

static void release(Barrier& b, u32 expected) {
    if (b.arrived == 0 || b.arrived < expected) return;
    b.arrived = 0;
    b.generation++;
}

static void meet_at_barrier(Barrier& b, u32 expected, const char* where) {
    if (b.arrived++ == 0) b.seen = b.asked = 0;
    b.seen = std::max(b.seen, current->seen);
    b.asked = std::max(b.asked, current->asked);
    u32 generation = b.generation;
    release(b, expected);
    if (b.generation == generation) wait(&b.generation, generation, where);
    current->seen = std::max(current->seen, b.seen);
    current->asked = std::max(current->asked, b.asked);
}

static void body() {
    Fiber& f = *current;
    entry(entry_arguments);
    if (!f.open_copies.empty() || !f.copy_groups.empty()) fail("ends before its asynchronous copies were waited for");
    if (!f.open_products.empty() || !f.product_groups.empty()) fail("ends before its products were waited for");
    never_published.insert(never_published.end(), f.stores.begin(), f.stores.end());
    f.finished = true;
    f.block->alive--;
    release(f.block->barriers[0], f.block->alive);
    for (;;) to_scheduler();
}

static std::unique_ptr<Block> start_block(uint3 index, u32 threads, size_t shared_bytes) {
    auto b = std::make_unique<Block>();
    b->index = index;
    b->alive = threads;
    b->warps.resize((threads + 31) / 32);
    if (shuffled)
        for (Warp& w : b->warps) w.pace = random_bits() % 2 ? 1 : 40;
    // Allocated to the byte, so that the address sanitizer sees the end; filled with NaNs.
    if (posix_memalign((void**)&b->shared, 1024, std::max<size_t>(shared_bytes, 1))) abort();
    memset(b->shared, 0xFF, shared_bytes);
    for (u32 i = 0; i < threads; i++) {
        auto f = std::make_unique<Fiber>();
        f->block = b.get();
        f->thread = i;
        f->stack.reset(new char[stack_bytes]);
        prepare(*f, body);
        b->fibers.push_back(std::move(f));
    }
    return b;
}

static void resume(Fiber& f) {
    current = &f;
    threadIdx = {f.thread % blockDim.x, f.thread / blockDim.x, 0};
    blockIdx = f.block->index;
    to_fiber(f);
    current = nullptr;
}

static bool can_run(const Fiber& f) { return !f.finished && (f.waits_for == nullptr || *f.waits_for != f.waits_value); }

static std::string stuck(const std::vector<std::unique_ptr<Block>>& blocks) {
    std::string message = "deadlock:";
    for (auto& b : blocks)
        for (auto& f : b->fibers)
            if (!f->finished && message.size() < 400)
                message += " [block " + std::to_string(b->index.x) + " thread " + std::to_string(f->thread) + " at " + f->waits_at + "]";
    return message;
}

// Runs the resident blocks for one round, each fiber once that can run and whose warp's turn it is; every warp's in round 0.
// False when none could run.
static bool run_round(std::vector<std::unique_ptr<Block>>& blocks, u32 round) {
    std::vector<Fiber*> order;
    for (auto& b : blocks)
        for (auto& f : b->fibers)
            if (!f->finished && round % b->warps[f->thread / 32].pace == 0) order.push_back(f.get());
    if (shuffled) std::shuffle(order.begin(), order.end(), random_bits);
    bool progress = false;
    for (Fiber* f : order) {
        if (!can_run(*f)) continue;
        resume(*f);
        progress = true;
        if (!error.empty()) return true;
    }
    return progress;
}

static std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, u32 seed, void (*e)(void**), void** arguments) {
    entry = e;
    entry_arguments = arguments;
    gridDim = grid;
    blockDim = block;
    error.clear();
    never_published.clear();
    random_bits.seed(seed);
    shuffled = seed != 0;
    std::vector<uint3> waiting;
    for (u32 z = 0; z < grid.z; z++)
        for (u32 y = 0; y < grid.y; y++)
            for (u32 x = 0; x < grid.x; x++) waiting.push_back({x, y, z});
    if (shuffled) std::shuffle(waiting.begin(), waiting.end(), random_bits);
    std::reverse(waiting.begin(), waiting.end());
    std::vector<std::unique_ptr<Block>> blocks;
    u32 round = 0;
    while (error.empty() && (!waiting.empty() || !blocks.empty())) {
        while (!waiting.empty() && blocks.size() < resident_blocks) {
            blocks.push_back(start_block(waiting.back(), block.x * block.y * block.z, shared_bytes));
            waiting.pop_back();
        }
        if (!run_round(blocks, round++) && !run_round(blocks, 0) && error.empty()) error = stuck(blocks);
        for (auto& b : blocks)
            if (b->alive == 0 || !error.empty()) free(std::exchange(b->shared, nullptr));
        blocks.erase(std::remove_if(blocks.begin(), blocks.end(), [](auto& b) { return b->alive == 0; }), blocks.end());
    }
    for (auto& s : never_published) memcpy(s.to, s.bytes, 16);
    return error;
}

} // namespace emulator

void __syncthreads() {
    emulator::Block& block = *emulator::current->block;
    emulator::meet_at_barrier(block.barriers[0], block.alive, "__syncthreads");
}

void named_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % 32) emulator::fail("a named barrier is one of 1..15, for whole warps");
    emulator::meet_at_barrier(emulator::current->block->barriers[id], (u32)threads, "named_barrier");
}
