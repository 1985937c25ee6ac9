// What sm_90a alone has: products of four warps, and copies of tiles, which go on by themselves until they are waited for.
//
// A product is computed when it is waited for, from shared memory as it is then; what has changed since it began is an error. Its
// sums are NaNs to their thread until then.
#pragma once

#include "warp.h"

namespace emulator {

const u32 in_use = 0xFFFFFFFFu; // of sums at work

// Where a byte of rows of 128 bytes really is: the pieces of 16 bytes of row i of eight are in the order j ^ i.
static char* turned(SharedAddress address) { return (char*)(address ^ (address >> 7 & 7) << 4); }

static u16 element(SharedAddress b, int row, int column) {
    u16 bits;
    memcpy(&bits, turned(b + row * 128 + column * 2), 2);
    return bits;
}

// The factors of a warp's part of a product, from its lanes' registers.
static std::shared_ptr<const Factors> factors(const Meeting& m, WgmmaOperand b, int tiles, bool bfloat) {
    auto made = std::make_shared<Factors>();
    made->b = b;
    made->tiles = tiles;
    made->bfloat = bfloat;
    for (int i = 0; i < 32; i++)
        for (int r = 0; r < 4; r++)
            for (int h = 0; h < 2; h++)
                made->a[i / 4 + 8 * (r & 1)][2 * (i % 4) + h + 8 * (r >> 1)] = element_value(m.in[i][r] >> (16 * h), bfloat);
    if (b % 128 % 32 || b / 128 % 8) fail("operand of wgmma that does not begin where tiles and steps do");
    for (int token = 0; token < 8 * tiles; token++)
        for (int column = 0; column < 16; column++) made->b_then.push_back(element(b, token, column));
    return made;
}

static SumsAtWork& sums_at_work(float (*place)[4], int tiles) {
    for (auto& s : current->at_work)
        if (s.place == place) return s;
    float* values = (float*)place;
    current->at_work.push_back({place, 0, std::vector<float>(values, values + 4 * tiles)});
    for (int i = 0; i < 4 * tiles; i++) memcpy(values + i, &in_use, 4);
    return current->at_work.back();
}

void start_product(float (*d)[4], const u32* a, WgmmaOperand operand, int tiles, bool bfloat) {
    if (!current->may_multiply) fail("wgmma without a fence after its registers were last free");
    Meeting& m = meeting_of(~0u);
    memcpy(m.in[lane()], a, 16);
    meet(m, "wgmma", [&](Meeting& m) { m.factors = factors(m, operand, tiles, bfloat); });
    Product p = {m.factors, d, a, {a[0], a[1], a[2], a[3]}};
    sums_at_work(d, tiles).products++;
    current->open_products.push_back(p);
}

static void add(const Product& p, std::vector<float>& sums) {
    const Factors& f = *p.factors;
    if (memcmp(p.a, p.a_then, 16)) fail("a fragment was written while the tensor cores read it");
    for (int j = 0; j < f.tiles; j++)
        for (int e = 0; e < 4; e++) {
            const int row = (int)lane() / 4 + 8 * (e >> 1), token = 8 * j + 2 * ((int)lane() % 4) + (e & 1);
            for (int k = 0; k < 16; k++) {
                const u16 then = f.b_then[token * 16 + k];
                if (then != element(f.b, token, k)) fail("shared memory was written while the tensor cores read it");
                sums[4 * j + e] += f.a[row][k] * element_value(then, f.bfloat);
            }
        }
}

static void give_back(SumsAtWork& s) {
    float* values = (float*)s.place;
    for (size_t i = 0; i < s.values.size(); i++) {
        if (memcmp(values + i, &in_use, 4)) fail("sums were written while the tensor cores added to them");
        values[i] = s.values[i];
    }
}

void wait_for_products(int pending) {
    Fiber& f = *current;
    f.may_multiply = false;
    while ((int)f.product_groups.size() > pending) {
        for (auto& p : f.product_groups.front()) {
            SumsAtWork& s = sums_at_work(p.sums, p.factors->tiles);
            add(p, s.values);
            if (--s.products == 0) {
                give_back(s);
                f.at_work.erase(f.at_work.begin() + (&s - f.at_work.data()));
            }
        }
        f.product_groups.erase(f.product_groups.begin());
    }
    meet(meeting_of(~0u), "wgmma_wait", [](Meeting&) {}); // a warp goes on together
}

} // namespace emulator

void wgmma_fence() {
    emulator::Fiber& f = *emulator::current;
    emulator::meet_at_barrier(f.block->warpgroups[f.thread / 128], 128, "wgmma_fence");
    f.may_multiply = true;
}

void wgmma_commit() {
    auto& f = *emulator::current;
    f.product_groups.push_back(std::move(f.open_products));
    f.open_products.clear();
}

namespace emulator {
static BytesBarrier& byte_barrier(SharedAddress barrier) {
    auto found = current->block->byte_barriers.find(barrier);
    if (found == current->block->byte_barriers.end()) fail("a barrier that nobody has set up");
    return found->second;
}

static u64 bytes_of_tile(const TensorMap& m) { return (u64)m.tile[0] * m.tile[1] * m.tile[2] * m.element_bytes; }

static void copy(SharedAddress to, const TensorMap& from, const int (&first)[3]) {
    const u32 size = from.element_bytes;
    u32 i[3];
    for (i[0] = 0; i[0] < from.tile[0]; i[0]++)
        for (i[1] = 0; i[1] < from.tile[1]; i[1]++)
            for (i[2] = 0; i[2] < from.tile[2]; i[2]++, to += size) {
                bool inside = true;
                u64 place = 0;
                for (int d = 0; d < 3; d++) {
                    inside = inside && first[d] + i[d] < from.sizes[d];
                    place = place * from.sizes[d] + first[d] + i[d];
                }
                char* there = from.turned ? turned(to) : (char*)to;
                if (inside) memcpy(there, from.elements + place * size, size);
                else memset(there, 0, size);
            }
}

// All that is on its way arrives, and with what is then complete the phase ends.
static void settle(BytesBarrier& b) {
    if (!b.arrived) return; // who expects bytes arrives
    for (auto& pending : b.copies) {
        if (pending.bytes > b.missing) fail("more bytes arrived at a barrier than it expects");
        b.missing -= pending.bytes;
        pending.copy();
    }
    b.copies.clear();
    if (b.arrived < b.arrivals || b.missing) return;
    b.arrived = 0;
    b.phases++;
}

static void arrive(SharedAddress barrier, u32 bytes) {
    maybe_yield();
    BytesBarrier& b = byte_barrier(barrier);
    settle(b);
    if (b.arrived == b.arrivals) fail("a barrier that still waits for bytes gets an arrival too many");
    b.arrived++;
    b.missing += bytes;
    b.asked++;
}

static void start_copy(SharedAddress to, u64 bytes, SharedAddress barrier, std::function<void()> copy) {
    memset((void*)to, 0xFF, bytes);
    BytesBarrier& b = byte_barrier(barrier);
    b.copies.push_back({bytes, std::move(copy)});
    b.asked++;
}
} // namespace emulator

void barrier_set_up(SharedAddress barrier, u32 arrivals) {
    emulator::aligned((const void*)barrier, 8, "barrier");
    emulator::BytesBarrier made;
    made.arrivals = arrivals;
    emulator::current->block->byte_barriers[barrier] = made;
}

void barrier_arrive(SharedAddress barrier) { emulator::arrive(barrier, 0); }
void barrier_expect(SharedAddress barrier, u32 bytes) { emulator::arrive(barrier, bytes); }

void copy_tile(SharedAddress to, const TensorMap* from, int layer, int row, int column, SharedAddress barrier) {
    if (to % (from->turned ? tile_alignment : 128)) emulator::fail("a tile that does not begin at a multiple of 128 or 1024 bytes");
    emulator::start_copy(to, emulator::bytes_of_tile(*from), barrier, [=] { emulator::copy(to, *from, {layer, row, column}); });
}

void barrier_wait(SharedAddress barrier, u32 phase) {
    emulator::maybe_yield();
    emulator::BytesBarrier& b = emulator::byte_barrier(barrier);
    for (;;) {
        if (b.phases % 2 == phase) emulator::settle(b);
        if (b.phases % 2 != phase) return;
        emulator::wait(&b.asked, b.asked, "barrier_wait");
    }
}
