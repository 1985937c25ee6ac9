// From words of bit planes to the A fragments of mma.m16n8k16.
//
// A word holds one bit of 64 rows and 16 columns, spread over the lanes as the fragments want them: bit
// (3 - p + 2c + 8u + 16h - d) mod 32 of a word of plane d belongs to row 16c + 8p + lane / 4 and column
// 8u + 2 (lane % 4) + h, and so to half h of register p + 2u of the fragment of rows 16c .. 16c + 15.
//
// Since neighbouring planes are turned against each other by one bit, planes merge by selecting bits alone: two planes into
// fields of 2 bits (for each p), four into fields of 4 (for each p and parity of c), eight into fields of 8 (for each p and c).
// A field then starts at bit 3 - p + 2c + 8u + 16h and goes down. One rotation puts both halves' fields where a 16-bit float
// has its mantissa, and one mask makes them floats:
//
//     float16   code << l, a subnormal number: code * 2^(l - 24), exactly and without a bias
//     bfloat16  1.0 with the code in its mantissa: 1 + code * 2^(l - 7); subnormals would underflow in float32
//
// A bfloat16 has room for 7 bits. Codes of 8 are cut in two nibbles with a fragment each, 16 + ... and 1 + ..., whose products
// go into one accumulator.
#pragma once
#include "device.cuh"

template <int bits, bool bfloat> struct Fragments {
    // Fragments per tile of 16 rows: of the high and of the low nibble, or one.
    static constexpr int parts = bfloat && bits == 8 ? 2 : 1;
    static constexpr int field = bits / parts;

    // Lowest bit of the field in its half, chosen so that as many registers as can be share a rotation.
    static constexpr DEVICE_CONSTANT int low(int c, int p) {
        if (bfloat) return field == 2 ? 2 + 2 * (c & 1) - p : field <= 4 ? 2 * (c & 1) + 4 - field : 0;
        return field == 2 ? 2 + 2 * c - p : field <= 4 ? 2 * c + 4 - field : 2 * (c & 1) + 8 - field;
    }

    // A fragment's value is bias + unit(c, p) * code.
    static constexpr DEVICE_CONSTANT float unit(int c, int p) { return (float)(1 << low(c, p)) / (bfloat ? 128.0f : 16777216.0f); }
    static constexpr DEVICE_CONSTANT float bias() { return !bfloat ? 0.0f : parts == 2 ? 17.0f : 1.0f; } /*bug:fragment-bias*/

    // planes: one word of each plane. fragment: [part][c][register], for `tiles` tiles of 16 rows from number `first` on, which is
    // 0 or a multiple of `tiles`; c counts from there. Words are not turned for that but masks, which a loop keeps.
    template <int tiles> static DEVICE_MEMBER void decode(const u32 (&planes)[bits], u32 (&fragment)[parts][tiles][4], int first = 0) {
        UNROLL
        for (int p = 0; p < 2; p++) {
            u32 pair[4];
            UNROLL
            for (int q = 0; 2 * q < bits; q++) {
                const u32 mask = p ? 0x55555555u : 0xAAAAAAAAu; /*bug:plane-masks*/
                pair[q] = 2 * q + 1 < bits ? bit_select(mask, planes[2 * q], planes[2 * q + 1]) : planes[2 * q];
            }
            UNROLL
            for (int c = 0; c < tiles; c++) {
                u32 merged[2];
                merge(pair, c, p, 2 * first, merged);
                UNROLL
                for (int part = 0; part < parts; part++)
                    UNROLL
                    for (int u = 0; u < 2; u++) fragment[part][c][p + 2 * u] = extract(merged[part], c, p, u, part, 2 * first); /*bug:fragment-registers*/
            }
        }
    }

  private:
    // Fields of up to 8 bits of tile c, or the two nibbles apart.
    static DEVICE_MEMBER void merge(const u32 (&pair)[4], int c, int p, int turn, u32 (&merged)[2]) {
        merged[0] = pair[0];
        if (bits <= 2) return;
        const u32 nibble_mask = turned(c & 1 ? 0x33333333u : 0xCCCCCCCCu, p, turn);
        merged[0] = bit_select(nibble_mask, pair[0], pair[1]);
        if (bits <= 4) return;
        const u32 low_nibble = bits > 6 ? bit_select(nibble_mask, pair[2], pair[3]) : pair[2];
        const u32 byte_mask = turned(c & 1 ? 0xC3C3C3C3u : 0xF0F0F0F0u, p, turn);
        if (parts == 2) merged[1] = low_nibble;
        else merged[0] = bit_select(c & 2 ? byte_mask : ~byte_mask, merged[0], low_nibble);
    }

    static DEVICE_MEMBER u32 turned(u32 mask, int p, int turn) { return rotate_right(mask, p - turn & 31); } /*bug:mask-rotation*/

    static DEVICE_MEMBER u32 extract(u32 merged, int c, int p, int u, int part, int turn) {
        const u32 mask = ((1u << field) - 1) << low(c, p);
        const int top = 3 - p + 2 * c + 8 * u - 4 * part;
        const u32 turned_word = rotate_right(merged, (top - low(c, p) - field + 1 + turn) & 31);
        if (!bfloat) return turned_word & (mask | mask << 16);
        const u32 one = parts == 2 && part == 0 ? 0x41804180u : 0x3F803F80u; // 16 or 1, twice
        return and_or(turned_word, mask | mask << 16, one);
    }
};

// `round` slicing: adds the bit after the slice to it, except to slices of all ones. planes: bits + 1 words; the first `bits`
// become the rounded slice.
template <int bits> DEVICE void round_slice(u32 (&planes)[bits + 1]) {
    u32 aligned[bits], all = ~0u; // every plane turned to the place of plane 0
    UNROLL
    for (int d = 0; d < bits; d++) all &= aligned[d] = rotate_right(planes[d], 32 - d);
    u32 carry = rotate_right(planes[bits], 32 - bits) & ~all; /*bug:round-overflow*/
    UNROLL
    for (int d = bits - 1; d >= 0; d--) {
        planes[d] = rotate_right(aligned[d] ^ carry, d);
        carry &= aligned[d];
    }
}
