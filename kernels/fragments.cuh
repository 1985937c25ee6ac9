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
//
// The bits after the fourth may be stretched: multiplied by stretch / 4, which is 1, 5/4 or 3/2. In float16 that needs two more
// bits, which the subnormal numbers have if l >= 2, and one multiplication and addition of the masked low bits. In bfloat16 a
// stretched code is always split into nibbles; the low one becomes stretch / 4 * code * 2^(l - 7), without the 1.
#pragma once
#include "device.cuh"

template <int bits, bool bfloat, int stretch = 4> struct Fragments {
    static constexpr bool kStretched = stretch != 4;
    static constexpr int kLowBits = bits > 4 ? bits - 4 : 0;                    // bits after the fourth
    static constexpr int kParts = bfloat && (bits == 8 || kStretched) ? 2 : 1;  // fragments per row tile: high and low nibble, or one
    static constexpr int kFieldBits = kParts == 2 ? 4 : bits;                   // missing bits of a low nibble are 0
    static_assert(!kStretched || bits > 4 && (stretch == 5 || stretch == 6), "codes of more than 4 bits, by 5/4 or 6/4");

    // Lowest bit of the field within its half. Chosen so that as many registers as possible share one rotation.
    static constexpr DEVICE_CONSTANT int field_shift(int c, int p) {
        if (bfloat) return kFieldBits == 2 ? 2 + 2 * (c & 1) - p : kFieldBits <= 4 ? 2 * (c & 1) + 4 - kFieldBits : 0;
        if (kStretched && bits > 6) return 10 - bits; // at least 2, also where c is even
        return kFieldBits == 2 ? 2 + 2 * c - p : kFieldBits <= 4 ? 2 * c + 4 - kFieldBits : 2 * (c & 1) + 8 - kFieldBits;
    }

    // Value of a fragment element: fragment_bias() + code_scale(c, p) * code (with stretched low bits), summed over the parts.
    static constexpr DEVICE_CONSTANT float code_scale(int c, int p) {
        return (float)(1 << field_shift(c, p) + (kParts == 2 ? 8 - bits : 0)) / (bfloat ? 128.0f : 16777216.0f);
    }
    static constexpr DEVICE_CONSTANT float fragment_bias() {
        return !bfloat ? 0.0f : kParts == 2 ? 16.0f + low_bias() : 1.0f; /*bug:fragment-bias*/
    }
    // Part of fragment_bias() in the last fragment.
    static constexpr DEVICE_CONSTANT float low_bias() { return bfloat && !kStretched ? 1.0f : 0.0f; }

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
                if (!kStretched) continue;
                UNROLL
                for (int u = 0; u < 2; u++) {
                    u32& last = fragment[kParts - 1][c][p + 2 * u];
                    last = stretch_low_bits(last, c, p);
                }
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
        const u32 missing = part == 1 ? 1u << 8 - bits : 1; // bits of a low nibble that are not there
        const u32 mask = ((1u << kFieldBits) - missing) << field_shift(c, p);
        const int top = 3 - p + 2 * c + 8 * u - 4 * part;
        const u32 aligned = rotate_right(merged, (top - field_shift(c, p) - kFieldBits + 1 + rotation) & 31);
        if (!bfloat) return aligned & (mask | mask << 16);
        const u32 one = kParts == 2 && part == 0 ? 0x41804180u : 0x3F803F80u; // bfloat16 16.0 or 1.0 in both halves
        return and_or(aligned, mask | mask << 16, one);
    }

    // Multiply the bits after the fourth of both halves by stretch / 4: those of a whole code (float16), or a low nibble plus 1.
    static DEVICE_MEMBER u32 stretch_low_bits(u32 fragment, int c, int p) {
        const u32 low = ((1u << kLowBits) - 1) << field_shift(c, p);
        const u32 excess = stretch == 5 ? 0x34003400u : 0x38003800u;  // float16 stretch / 4 - 1
        const u32 factor = stretch == 5 ? 0x3FA03FA0u : 0x3FC03FC0u;  // bfloat16 stretch / 4
        if (!bfloat) return fma_half2(fragment & (low | low << 16), excess, fragment); /*bug:stretch-low-bits*/
        return fma_bfloat2(fragment, factor, factor | 0x80008000u); /*bug:stretch-nibble*/
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
