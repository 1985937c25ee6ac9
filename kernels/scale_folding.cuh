// Folding of the group scale into the A fragments, which then hold the dequantized weights in the dtype of x.
#pragma once
#include "zero_point.cuh"

// Factor of the fragments with folded zero point. A float16 factor is finite for weights whose neighbouring levels differ by less
// than 128.
struct ScaleFolding {
    u32 high[kRowTiles][2], low[kRowTiles][2]; // [c][p], the same number in both halves; bfloat16 holds a float16 scale in two parts

    static constexpr bool kHasLow = BFLOAT && !SCALE_BFLOAT;

    DEVICE_MEMBER void set(const GroupScales<kRowTiles>& group, float gain) {
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                const float scale = group.scale[c][p] * gain / ZeroPointFolding::code_scale(c, p);
                const u16 first = BFLOAT ? float_to_bfloat(scale) : float_to_half(scale);
                high[c][p] = pair_of(first);
                if (kHasLow) low[c][p] = pair_of(float_to_bfloat(scale - bfloat_to_float(first)));
            }
    }

    // Scale the fragments; the sum of the parts replaces fragment[0].
    DEVICE_MEMBER void apply(StepFragments& fragment) const {
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int r = 0; r < 4; r++) {
                u32& f = fragment[0][c][r];
                const u32 s = high[c][r % 2], minus_zero = 0x80008000u;
                if (!BFLOAT) {
                    f = fma_half2(f, s, minus_zero);
                    continue;
                }
                const u32 residual = kHasLow ? fma_bfloat2(f, low[c][r % 2], minus_zero) : minus_zero; /*bug:scale-residual*/
                f = fma_bfloat2(f, s, Fragment::kParts == 2 ? fma_bfloat2(fragment[Fragment::kParts - 1][c][r], s, residual) : residual);
            }
    }
};
