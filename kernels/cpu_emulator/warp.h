// Warp-level operations: shuffles, votes, ldmatrix, mma.
#pragma once

#include "memory.h"

namespace emulator {

u32 lane() { return current->thread % 32; }

static WarpCollective& collective_of(u32 mask) {
    Warp& w = current->block->warps[current->thread / 32];
    for (auto& c : w.collectives)
        if (c->mask == mask) return *c;
    w.collectives.push_back(std::make_unique<WarpCollective>());
    w.collectives.back()->mask = mask;
    return *w.collectives.back();
}

// Lanes of `mask` that exist: the last warp of a block may have fewer than 32.
static u32 existing_lanes(u32 mask) {
    u32 threads = (u32)current->block->fibers.size() - current->thread / 32 * 32;
    return threads >= 32 ? mask : mask & ((1u << threads) - 1);
}

// Wait for all lanes of the mask. The caller has stored its operands; the last lane to arrive runs `compute`.
template <class Compute> static void run_collective(WarpCollective& c, const char* operation, Compute compute) {
    if (!(c.mask >> lane() & 1)) fail(std::string(operation) + " by a lane that its mask leaves out");
    if (c.arrived && strcmp(c.operation, operation)) fail(std::string("lanes of one warp diverged: ") + c.operation + " and " + operation);
    c.operation = operation;
    c.arrived |= 1u << lane();
    if (c.arrived != existing_lanes(c.mask)) return wait(&c.generation, c.generation, operation);
    compute(c);
    c.arrived = 0;
    c.generation++;
}

u32 shuffle(u32 mask, u32 value, u32 source, const char* operation) {
    WarpCollective& c = collective_of(mask);
    c.in[lane()][0] = value;
    c.in[lane()][1] = source;
    run_collective(c, operation, [](WarpCollective& c) {
        for (u32 i = 0; i < 32; i++) {
            u32 source = c.in[i][1] & 31;
            // The value of a lane outside the mask is undefined in CUDA; here it is a NaN.
            c.out[i][0] = c.mask >> source & 1 ? c.in[source][0] : 0xFFFFFFFFu;
        }
    });
    return c.out[lane()][0];
}

static float half_value(u32 bits) {
    u32 sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FF;
    if (exponent == 0) {
        float f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    u32 wide = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}

const float* half_table() {
    static const std::vector<float> table = [] {
        std::vector<float> t(65536);
        for (u32 i = 0; i < 65536; i++) t[i] = half_value(i);
        return t;
    }();
    return table.data();
}

static float element_value(u32 bits, bool bfloat) {
    static const float* half = half_table();
    return bfloat ? bfloat_to_float((u16)bits) : half[bits & 0xFFFF];
}

// d = a b + c on the fragments of one warp, summed over k in order, in float32.
template <bool bfloat> static void multiply(WarpCollective& m) {
    auto value = [](u32 word, int h) { return element_value(word >> (16 * h), bfloat); };
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; i++) {
        int g = i / 4, t = i % 4;
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < 4; r++) a[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = value(m.in[i][r], h);
            for (int r = 0; r < 2; r++) b[2 * t + h + 8 * r][g] = value(m.in[i][4 + r], h);
        }
        for (int e = 0; e < 4; e++) memcpy(&d[g + 8 * (e >> 1)][2 * t + (e & 1)], &m.in[i][6 + e], 4);
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) d[row][n] += a[row][k] * b[k][n];
    for (int i = 0; i < 32; i++)
        for (int e = 0; e < 4; e++) memcpy(&m.out[i][e], &d[i / 4 + 8 * (e >> 1)][2 * (i % 4) + (e & 1)], 4);
}

template <bool bfloat> static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    WarpCollective& m = collective_of(~0u);
    u32(&in)[10] = m.in[lane()];
    memcpy(in, a, 16);
    in[4] = b0;
    in[5] = b1;
    memcpy(in + 6, c, 16);
    run_collective(m, bfloat ? "mma_bf16" : "mma_f16", multiply<bfloat>);
    memcpy(d, m.out[lane()], 16);
}

} // namespace emulator

u32 __ballot_sync(u32 mask, int predicate) {
    emulator::WarpCollective& c = emulator::collective_of(mask);
    c.in[emulator::lane()][0] = predicate != 0;
    emulator::run_collective(c, "__ballot_sync", [](emulator::WarpCollective& c) {
        u32 votes = 0;
        for (int i = 0; i < 32; i++) votes |= (c.arrived >> i & 1 ? c.in[i][0] : 0) << i;
        for (int i = 0; i < 32; i++) c.out[i][0] = votes;
    });
    return c.out[emulator::lane()][0];
}

// Also orders memory among the lanes: all of them get the latest fence and atomic times.
void __syncwarp(u32 mask) {
    emulator::WarpCollective& c = emulator::collective_of(mask);
    emulator::Fiber& f = *emulator::current;
    memcpy(&c.in[emulator::lane()][0], &f.last_fence, 8);
    memcpy(&c.in[emulator::lane()][2], &f.last_atomic, 8);
    emulator::run_collective(c, "__syncwarp", [](emulator::WarpCollective& c) {
        u64 latest[2] = {0, 0}, times[2];
        for (int i = 0; i < 32; i++)
            if (c.arrived >> i & 1) {
                memcpy(times, c.in[i], 16);
                for (int k = 0; k < 2; k++) latest[k] = std::max(latest[k], times[k]);
            }
        for (int i = 0; i < 32; i++) memcpy(c.out[i], latest, 16);
    });
    u64 latest[2];
    memcpy(latest, c.out[emulator::lane()], 16);
    f.last_fence = latest[0];
    f.last_atomic = latest[1];
}

void ldmatrix_x4(u32 (&r)[4], SharedAddress address) {
    const void* row = (const void*)address;
    emulator::check_aligned(row, 16, "row of ldmatrix");
    emulator::WarpCollective& c = emulator::collective_of(~0u);
    c.address[emulator::lane()] = row;
    emulator::run_collective(c, "ldmatrix", [](emulator::WarpCollective& c) {
        for (int q = 0; q < 4; q++)
            for (int i = 0; i < 32; i++) memcpy(&c.out[i][q], (const char*)c.address[q * 8 + i / 4] + (i % 4) * 4, 4);
    });
    memcpy(r, c.out[emulator::lane()], 16);
}

void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { emulator::mma<false>(d, a, b0, b1, c); }
void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { emulator::mma<true>(d, a, b0, b1, c); }
