// Folding of offset and zero point into the 16-bit A fragments.
//
// Exact in the operand's dtype for the formats that matquant/inference/gemm_shape.py admits to WGMMA. No sums of x are needed then.
#pragma once
#include "gemm_config.cuh"

DEVICE u32 pair_of(u16 bits) { return bits | (u32)bits << 16; }

// Fragments with folded zero point have the value code_scale(c, p) * (code + code_bias): where nibbles have fragments of their own, in
// the sum of the two.
struct ZeroPointFolding {
    u32 addend[Fragment::kParts][kRowTiles][2]; // [part][c][p], the same number in both halves

    static constexpr DEVICE_CONSTANT float code_scale(int c, int p) { return Fragment::code_scale(c, p) * (BFLOAT ? 1.0f : 32768.0f); }

    DEVICE_MEMBER void set(const GroupScales<kRowTiles>& group) {
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                const float code_bias = group.code_bias[c][p];
                const float unit = (float)(1 << Fragment::kLowBits); // of the high nibble, in codes
                const float high = Fragment::kParts == 2 ? unit * (int)(code_bias / unit) : 0.0f; // folded into the high nibble
                if (!BFLOAT) {
                    addend[0][c][p] = pair_of(float_to_half(code_bias * code_scale(c, p)));
                } else {
                    if (Fragment::kParts == 2) addend[0][c][p] = pair_of(float_to_bfloat(high * code_scale(c, p)));
                    addend[Fragment::kParts - 1][c][p] = pair_of(float_to_bfloat((code_bias - high) * code_scale(c, p)));
                }
            }
    }

    DEVICE_MEMBER void apply(StepFragments& fragment) const {
        UNROLL
        for (int part = 0; part < Fragment::kParts; part++)
            UNROLL
            for (int c = 0; c < kRowTiles; c++)
                UNROLL
                for (int r = 0; r < 4; r++) {
                    u32& f = fragment[part][c][r];
                    const u32 one = 0x3F803F80u; // 1.0 in both halves
                    const u32 low_bias = Fragment::kStretched ? 0x80008000u : 0xBF80BF80u; /*bug:low-bias*/ // -0 or -1
                    const u32 bias = part + 1 == Fragment::kParts ? low_bias : 0xC180C180u; // or -16
                    if (BFLOAT) f = fma_bfloat2(fma_bfloat2(f, one, bias), one, addend[part][c][r % 2]);
                    else f = fma_half2(f, 0x78007800u, addend[part][c][r % 2]); // times 2^15: the result is a normal number
                }
    }
};
