// Conversion of bit-plane words to A fragments of mma.m16n8k16.
//
// A word holds one bit of 64 rows and 16 columns, distributed over the lanes like the fragments: bit
// (3 - p + 2c + 8u + 16h - d) mod 32 of a word of plane d belongs to row 16c + 8p + lane / 4 and column 8u + 2 (lane % 4) + h,
// which is half h of register p + 2u of the fragment of rows 16c .. 16c + 15 (row tile c).
//
// Words of neighbouring planes are rotated by one bit relative to each other, so planes merge by bit selection alone: two planes
// into fields of 2 bits (for each p), four into fields of 4 (for each p and parity of c), eight into fields of 8 (for each p and c).
// A field then extends downwards from bit 3 - p + 2c + 8u + 16h. One rotation moves the fields of both halves to the mantissa bits
// of a 16-bit float, and one mask makes them floats. With l the lowest bit of the field:
//
//     float16   subnormal number code << l, with the value code * 2^(l - 24): exact, no bias
//     bfloat16  1.0 with the code in the mantissa: 1 + code * 2^(l - 7). A subnormal would underflow in float32.
//
// A bfloat16 mantissa has 7 bits. Codes of 8 bits are split into two nibbles with one fragment each, 16 + ... and 1 + ..., whose
// products are added to the same accumulator.
#pragma once
#include "device.cuh"

template <int bits, bool bfloat> struct Fragments {
    static constexpr int kParts = bfloat && bits == 8 ? 2 : 1; // fragments per row tile: high and low nibble, or one
    static constexpr int kFieldBits = bits / kParts;

    // Lowest bit of the field within its half. Chosen so that as many registers as possible share one rotation.
    static constexpr DEVICE_CONSTANT int field_shift(int c, int p) {
        if (bfloat) return kFieldBits == 2 ? 2 + 2 * (c & 1) - p : kFieldBits <= 4 ? 2 * (c & 1) + 4 - kFieldBits : 0;
        return kFieldBits == 2 ? 2 + 2 * c - p : kFieldBits <= 4 ? 2 * c + 4 - kFieldBits : 2 * (c & 1) + 8 - kFieldBits;
    }

    // Value of a fragment element: fragment_bias() + code_scale(c, p) * code, summed over the parts.
    static constexpr DEVICE_CONSTANT float code_scale(int c, int p) {
        return (float)(1 << field_shift(c, p)) / (bfloat ? 128.0f : 16777216.0f);
    }
    static constexpr DEVICE_CONSTANT float fragment_bias() {
        return !bfloat ? 0.0f : kParts == 2 ? 17.0f : 1.0f; /*bug:fragment-bias*/
    }

    // Fragments of `tiles` row tiles, from row tile `first_tile` on (0 or a multiple of `tiles`).
    //
    // planes: one word of each plane. fragment: [part][c][register], with c relative to first_tile. Masks are rotated to first_tile
    // instead of the words, because rotated masks are loop-invariant.
    template <int tiles>
    static DEVICE_MEMBER void unpack(const u32 (&planes)[bits], u32 (&fragment)[kParts][tiles][4], int first_tile = 0) {
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
                merge_pairs(pair, c, p, 2 * first_tile, merged);
                UNROLL
                for (int part = 0; part < kParts; part++)
                    UNROLL
                    for (int u = 0; u < 2; u++)
                        fragment[part][c][p + 2 * u] = extract_field(merged[part], c, p, u, part, 2 * first_tile); /*bug:fragment-registers*/
            }
        }
    }

  private:
    // Merge pairs of planes into fields of up to 8 bits of row tile c, or into its two nibbles.
    static DEVICE_MEMBER void merge_pairs(const u32 (&pair)[4], int c, int p, int rotation, u32 (&merged)[2]) {
        merged[0] = pair[0];
        if (bits <= 2) return;
        const u32 nibble_mask = rotated_mask(c & 1 ? 0x33333333u : 0xCCCCCCCCu, p, rotation);
        merged[0] = bit_select(nibble_mask, pair[0], pair[1]);
        if (bits <= 4) return;
        const u32 low_nibble = bits > 6 ? bit_select(nibble_mask, pair[2], pair[3]) : pair[2];
        const u32 byte_mask = rotated_mask(c & 1 ? 0xC3C3C3C3u : 0xF0F0F0F0u, p, rotation);
        if (kParts == 2) merged[1] = low_nibble;
        else merged[0] = bit_select(c & 2 ? byte_mask : ~byte_mask, merged[0], low_nibble);
    }

    static DEVICE_MEMBER u32 rotated_mask(u32 mask, int p, int rotation) {
        return rotate_right(mask, p - rotation & 31); /*bug:mask-rotation*/
    }

    // Register p + 2u of one part: the field in both halves, at the mantissa bits.
    static DEVICE_MEMBER u32 extract_field(u32 merged, int c, int p, int u, int part, int rotation) {
        const u32 mask = ((1u << kFieldBits) - 1) << field_shift(c, p);
        const int top = 3 - p + 2 * c + 8 * u - 4 * part;
        const u32 aligned = rotate_right(merged, (top - field_shift(c, p) - kFieldBits + 1 + rotation) & 31);
        if (!bfloat) return aligned & (mask | mask << 16);
        const u32 one = kParts == 2 && part == 0 ? 0x41804180u : 0x3F803F80u; // bfloat16 16.0 or 1.0 in both halves
        return and_or(aligned, mask | mask << 16, one);
    }
};

// `round` slicing: add the first dropped bit to the slice, saturating at all ones. planes: bits + 1 words; the first `bits` words
// become the rounded slice.
template <int bits> DEVICE void round_slice(u32 (&planes)[bits + 1]) {
    u32 aligned[bits], all_ones = ~0u; // all planes rotated to the bit positions of plane 0
    UNROLL
    for (int d = 0; d < bits; d++) all_ones &= aligned[d] = rotate_right(planes[d], 32 - d);
    u32 carry = rotate_right(planes[bits], 32 - bits) & ~all_ones; /*bug:round-overflow*/
    UNROLL
    for (int d = bits - 1; d >= 0; d--) {
        planes[d] = rotate_right(aligned[d] ^ carry, d);
        carry &= aligned[d];
    }
}
