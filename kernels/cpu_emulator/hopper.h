// Instructions of sm_90a: WGMMA, mbarriers and TMA loads.
//
// A WGMMA is computed at its wait, from shared memory at that time; a change of an operand since the issue is an error. Until then its
// accumulator registers hold NaNs.
#pragma once

#include "warp.h"

namespace emulator {

const u32 kPendingValue = 0xFFFFFFFFu; // content of the registers of pending accumulators

// Address of a byte with the 128-byte swizzle: 16-byte chunk j of row i is stored at chunk j ^ (i % 8).
static char* swizzle_128b(SharedAddress address) { return (char*)(address ^ (address >> 7 & 7) << 4); }

static u16 swizzled_element(SharedAddress b, int row, int column) {
    u16 bits;
    memcpy(&bits, swizzle_128b(b + row * 128 + column * 2), 2);
    return bits;
}

// Operands of one warp's part of a WGMMA, from its lanes' registers and shared memory.
static std::shared_ptr<const WgmmaOperands> read_operands(const WarpCollective& c, WgmmaDescriptor b, int tiles, bool bfloat) {
    auto operands = std::make_shared<WgmmaOperands>();
    operands->b = b;
    operands->tiles = tiles;
    operands->bfloat = bfloat;
    for (int i = 0; i < 32; i++)
        for (int r = 0; r < 4; r++)
            for (int h = 0; h < 2; h++)
                operands->a[i / 4 + 8 * (r & 1)][2 * (i % 4) + h + 8 * (r >> 1)] = element_value(c.in[i][r] >> (16 * h), bfloat);
    if (b % 128 % 32 || b / 128 % 8) fail("misaligned WGMMA operand in shared memory: it must start at a k-step of a swizzled tile");
    for (int token = 0; token < 8 * tiles; token++)
        for (int column = 0; column < 16; column++) operands->b_at_issue.push_back(swizzled_element(b, token, column));
    return operands;
}

// Pending accumulators in these registers; created with the registers' values if there are none.
static PendingAccumulators& pending_accumulators(float (*registers)[4], int tiles) {
    for (auto& p : current->accumulators)
        if (p.registers == registers) return p;
    float* values = (float*)registers;
    current->accumulators.push_back({registers, 0, std::vector<float>(values, values + 4 * tiles)});
    for (int i = 0; i < 4 * tiles; i++) memcpy(values + i, &kPendingValue, 4);
    return current->accumulators.back();
}

void issue_wgmma(float (*d)[4], const u32* a, WgmmaDescriptor b, int tiles, bool bfloat) {
    if (!current->wgmma_fenced) fail("WGMMA without wgmma_fence after the last wait");
    WarpCollective& c = collective_of(~0u);
    memcpy(c.in[lane()], a, 16);
    run_collective(c, "wgmma", [&](WarpCollective& c) { c.operands = read_operands(c, b, tiles, bfloat); });
    PendingWgmma wgmma = {c.operands, d, a, {a[0], a[1], a[2], a[3]}};
    pending_accumulators(d, tiles).pending++;
    current->open_wgmmas.push_back(wgmma);
}

// Add one WGMMA to this lane's accumulators.
static void execute(const PendingWgmma& wgmma, std::vector<float>& sums) {
    const WgmmaOperands& o = *wgmma.operands;
    if (memcmp(wgmma.a, wgmma.a_at_issue, 16)) fail("fragment registers were written while WGMMA read them");
    for (int j = 0; j < o.tiles; j++)
        for (int e = 0; e < 4; e++) {
            const int row = (int)lane() / 4 + 8 * (e >> 1), token = 8 * j + 2 * ((int)lane() % 4) + (e & 1);
            for (int k = 0; k < 16; k++) {
                const u16 element = o.b_at_issue[token * 16 + k];
                if (element != swizzled_element(o.b, token, k)) fail("shared memory was written while WGMMA read it");
                sums[4 * j + e] += o.a[row][k] * element_value(element, o.bfloat);
            }
        }
}

static void write_back(PendingAccumulators& p) {
    float* values = (float*)p.registers;
    for (size_t i = 0; i < p.values.size(); i++) {
        if (memcmp(values + i, &kPendingValue, 4)) fail("accumulator registers were written while WGMMA added to them");
        values[i] = p.values[i];
    }
}

void wait_for_wgmma(int pending) {
    Fiber& f = *current;
    f.wgmma_fenced = false;
    while ((int)f.wgmma_groups.size() > pending) {
        for (auto& wgmma : f.wgmma_groups.front()) {
            PendingAccumulators& p = pending_accumulators(wgmma.d, wgmma.operands->tiles);
            execute(wgmma, p.values);
            if (--p.pending == 0) {
                write_back(p);
                f.accumulators.erase(f.accumulators.begin() + (&p - f.accumulators.data()));
            }
        }
        f.wgmma_groups.erase(f.wgmma_groups.begin());
    }
    run_collective(collective_of(~0u), "wgmma_wait", [](WarpCollective&) {}); // the instruction is warp-synchronous
}

} // namespace emulator

void wgmma_fence() {
    emulator::Fiber& f = *emulator::current;
    emulator::arrive_and_wait(f.block->warpgroups[f.thread / 128], 128, "wgmma_fence");
    f.wgmma_fenced = true;
}

void wgmma_commit() {
    auto& f = *emulator::current;
    f.wgmma_groups.push_back(std::move(f.open_wgmmas));
    f.open_wgmmas.clear();
}

namespace emulator {
static Mbarrier& mbarrier_at(Block& block, SharedAddress barrier) {
    auto found = block.mbarriers.find(barrier);
    if (found == block.mbarriers.end()) fail("uninitialized mbarrier");
    return found->second;
}

static Mbarrier& mbarrier_at(SharedAddress barrier) { return mbarrier_at(*current->block, barrier); }

static u64 box_bytes(const TensorMap& m) { return (u64)m.box[0] * m.box[1] * m.box[2] * m.element_bytes; }

// Copy a box to shared memory. Elements outside the array are 0.
static void copy_box(SharedAddress to, const TensorMap& from, const int (&first)[3]) {
    const u32 size = from.element_bytes;
    u32 i[3];
    for (i[0] = 0; i[0] < from.box[0]; i[0]++)
        for (i[1] = 0; i[1] < from.box[1]; i[1]++)
            for (i[2] = 0; i[2] < from.box[2]; i[2]++, to += size) {
                bool inside = true;
                u64 index = 0;
                for (int d = 0; d < 3; d++) {
                    inside = inside && first[d] + i[d] < from.sizes[d];
                    index += (u64)(first[d] + i[d]) * (d < 2 ? from.strides[d] : 1);
                }
                char* element = from.swizzled ? swizzle_128b(to) : (char*)to;
                if (inside) memcpy(element, from.elements + index * size, size);
                else memset(element, 0, size);
            }
}

// Complete all pending loads, and the phase if nothing is missing.
static void complete_loads(Mbarrier& b) {
    if (!b.arrived) return; // bytes are expected by an arrival
    for (auto& load : b.loads) {
        if (load.bytes > b.expected_bytes) fail("mbarrier received more bytes than expected");
        b.expected_bytes -= load.bytes;
        load.copy();
    }
    b.loads.clear();
    if (b.arrived < b.expected_arrivals || b.expected_bytes) return;
    b.arrived = 0;
    b.completed_phases++;
}

static void arrive(SharedAddress barrier, u32 bytes) {
    maybe_yield();
    Mbarrier& b = mbarrier_at(barrier);
    complete_loads(b);
    if (b.arrived == b.expected_arrivals) fail("too many arrivals at an mbarrier that still expects bytes");
    b.arrived++;
    b.expected_bytes += bytes;
    b.events++;
}

static void start_load(SharedAddress to, u64 bytes, Mbarrier& b, std::function<void()> copy) {
    memset((void*)to, 0xFF, bytes);
    b.loads.push_back({bytes, std::move(copy)});
    b.events++;
}
} // namespace emulator

void mbarrier_init(SharedAddress barrier, u32 arrivals) {
    emulator::check_aligned((const void*)barrier, 8, "mbarrier");
    emulator::Mbarrier b;
    b.expected_arrivals = arrivals;
    emulator::current->block->mbarriers[barrier] = b;
}

void mbarrier_arrive(SharedAddress barrier) { emulator::arrive(barrier, 0); }
void mbarrier_arrive_expect_tx(SharedAddress barrier, u32 bytes) { emulator::arrive(barrier, bytes); }

void tma_load_3d(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier) {
    emulator::check_aligned((const void*)to, from->swizzled ? kSwizzleAlignment : 128, "destination of a TMA load");
    emulator::start_load(to, emulator::box_bytes(*from), emulator::mbarrier_at(barrier), [=] { emulator::copy_box(to, *from, {layer, row, column}); });
}

void mbarrier_wait(SharedAddress barrier, u32 parity) {
    emulator::maybe_yield();
    emulator::Mbarrier& b = emulator::mbarrier_at(barrier);
    for (;;) {
        if (b.completed_phases % 2 == parity) emulator::complete_loads(b);
        if (b.completed_phases % 2 != parity) return;
        emulator::wait(&b.events, b.events, "mbarrier_wait");
    }
}

void mbarrier_wait_cluster(SharedAddress barrier, u32 parity) { mbarrier_wait(barrier, parity); }

void store_cluster_async(SharedAddress address, SharedAddress barrier, u32 rank, float4 v) {
    using namespace emulator;
    const Block& own = *current->block;
    if (!current->cluster_begun) fail("store_cluster_async before a cluster_wait: the other block may not have begun");
    if (rank >= own.cluster->blocks.size()) fail("store_cluster_async: no block " + std::to_string(rank) + " in the cluster");
    Block& block = *own.cluster->blocks[rank];
    if (block.alive == 0) fail("store_cluster_async: block " + std::to_string(rank) + " of the cluster has exited");
    const SharedAddress there = (SharedAddress)block.shared - (SharedAddress)own.shared;
    check_aligned((const void*)address, 16, "store_cluster_async");
    start_load(address + there, 16, mbarrier_at(block, barrier + there), [=] { memcpy((void*)(address + there), &v, 16); });
}
