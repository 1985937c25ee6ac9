// Operations of a whole warp: shuffles, votes, ldmatrix, mma. Lanes meet; the last to come computes for all.
#pragma once

#include "memory.h"

namespace emulator {

u32 lane() { return current->thread % 32; }

static Meeting& meeting_of(u32 mask) {
    Warp& w = current->block->warps[current->thread / 32];
    for (auto& m : w.meetings)
        if (m->mask == mask) return *m;
    w.meetings.push_back(std::make_unique<Meeting>());
    w.meetings.back()->mask = mask;
    return *w.meetings.back();
}

// The lanes of `mask` that exist: the last warp of a block may be short.
static u32 present(u32 mask) {
    u32 threads = (u32)current->block->fibers.size() - current->thread / 32 * 32;
    return threads >= 32 ? mask : mask & ((1u << threads) - 1);
}

// Waits for all lanes of `mask`, whose operands the caller has left in the meeting; `compute` runs once.
template <class Compute> static void meet(Meeting& m, const char* operation, Compute compute) {
    if (!(m.mask >> lane() & 1)) fail(std::string(operation) + " by a lane that its mask leaves out");
    if (m.arrived && strcmp(m.operation, operation)) fail(std::string("lanes of one warp diverged: ") + m.operation + " and " + operation);
    m.operation = operation;
    m.arrived |= 1u << lane();
    if (m.arrived != present(m.mask)) return wait(&m.generation, m.generation, operation);
    compute(m);
    m.arrived = 0;
    m.generation++;
}

u32 shuffle(u32 mask, u32 value, u32 source, const char* operation) {
    Meeting& m = meeting_of(mask);
    m.in[lane()][0] = value;
    m.in[lane()][1] = source;
    meet(m, operation, [](Meeting& m) {
        for (u32 i = 0; i < 32; i++) {
            u32 source = m.in[i][1] & 31;
            // A lane outside the mask has nothing to give: CUDA leaves the result undefined, here it is a NaN.
            m.out[i][0] = m.mask >> source & 1 ? m.in[source][0] : 0xFFFFFFFFu;
        }
    });
    return m.out[lane()][0];
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

// d = a b + c on the fragments of one warp; sums run over k in order, in float32.
template <bool bfloat> static void multiply(Meeting& m) {
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
    Meeting& m = meeting_of(~0u);
    u32(&in)[10] = m.in[lane()];
    memcpy(in, a, 16);
    in[4] = b0;
    in[5] = b1;
    memcpy(in + 6, c, 16);
    meet(m, bfloat ? "mma_bfloat" : "mma_half", multiply<bfloat>);
    memcpy(d, m.out[lane()], 16);
}

} // namespace emulator

u32 __ballot_sync(u32 mask, int predicate) {
    emulator::Meeting& m = emulator::meeting_of(mask);
    m.in[emulator::lane()][0] = predicate != 0;
    emulator::meet(m, "__ballot_sync", [](emulator::Meeting& m) {
        u32 votes = 0;
        for (int i = 0; i < 32; i++) votes |= (m.arrived >> i & 1 ? m.in[i][0] : 0) << i;
        for (int i = 0; i < 32; i++) m.out[i][0] = votes;
    });
    return m.out[emulator::lane()][0];
}

// Orders memory among the lanes too: what one lane has seen by its fences, all have seen.
void __syncwarp(u32 mask) {
    emulator::Meeting& m = emulator::meeting_of(mask);
    emulator::Fiber& f = *emulator::current;
    memcpy(&m.in[emulator::lane()][0], &f.seen, 8);
    memcpy(&m.in[emulator::lane()][2], &f.asked, 8);
    emulator::meet(m, "__syncwarp", [](emulator::Meeting& m) {
        u64 latest[2] = {0, 0}, times[2];
        for (int i = 0; i < 32; i++)
            if (m.arrived >> i & 1) {
                memcpy(times, m.in[i], 16);
                for (int k = 0; k < 2; k++) latest[k] = std::max(latest[k], times[k]);
            }
        for (int i = 0; i < 32; i++) memcpy(m.out[i], latest, 16);
    });
    u64 latest[2];
    memcpy(latest, m.out[emulator::lane()], 16);
    f.seen = latest[0];
    f.asked = latest[1];
}

void load_matrices(u32 (&r)[4], SharedAddress address) {
    const void* row = (const void*)address;
    emulator::aligned(row, 16, "row of ldmatrix");
    emulator::Meeting& m = emulator::meeting_of(~0u);
    m.address[emulator::lane()] = row;
    emulator::meet(m, "ldmatrix", [](emulator::Meeting& m) {
        for (int q = 0; q < 4; q++)
            for (int i = 0; i < 32; i++) memcpy(&m.out[i][q], (const char*)m.address[q * 8 + i / 4] + (i % 4) * 4, 4);
    });
    memcpy(r, m.out[emulator::lane()], 16);
}

void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { emulator::mma<false>(d, a, b0, b1, c); }
void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { emulator::mma<true>(d, a, b0, b1, c); }
