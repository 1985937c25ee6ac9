// Scales and zero points of one group, for the rows of one lane.
#pragma once
#include "device.cuh"

DEVICE float scale_to_float(u32 bits) { return SCALE_BFLOAT ? bfloat_to_float((u16)bits) : half_to_float((u16)bits); }

// Affine parameters of rows 16c + 8p + lane / 4 in one group: the weight is proportional to scale * (code + code_bias).
template <int row_tiles> struct GroupScales {
    float scale[row_tiles][2];     // [c][p]
    float code_bias[row_tiles][2]; // offset - zero_step * zero point
};

// Load the parameters of `row_tiles` row tiles. scales, zeros: those of the lane's 8 rows, as [c][p]; zeros is read if ZEROS. first: index
// of the first row tile's scale.
template <int row_tiles>
DEVICE GroupScales<row_tiles> load_group_scales(const u16* scales, const u8* zeros, int first, float offset, float zero_step, float gain = 1.0f) {
    u32 pairs[4]; // one load for all row tiles
    if (row_tiles == 4) *(uint4*)pairs = *(const uint4*)(scales + first);
    else if (row_tiles == 2) *(uint2*)pairs = *(const uint2*)(scales + first);
    else pairs[0] = *(const u32*)(scales + first);
    GroupScales<row_tiles> group;
    UNROLL
    for (int c = 0; c < row_tiles; c++) {
        UNROLL
        for (int p = 0; p < 2; p++) {
            group.scale[c][p] = scale_to_float(pairs[c] >> (16 * p)) * gain;
            group.code_bias[c][p] = offset;
            if (ZEROS) group.code_bias[c][p] -= zero_step * zeros[first + 2 * c + p];
        }
    }
    return group;
}
