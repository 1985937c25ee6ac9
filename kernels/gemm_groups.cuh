// What both ways of multiplying need of a chunk of weights: fragments, and what is the same for a group.
#pragma once
#include "gemm_shape.cuh"

DEVICE float scale_value(u32 bits) { return SCALE_BFLOAT ? bfloat_to_float((u16)bits) : half_to_float((u16)bits); }

// Of a warp's rows 16c + 8p + lane / 4 in one group: the scale, and what is added to each code.
struct Group {
    float scale[row_tiles_of_warp][2], distance[row_tiles_of_warp][2];
};

// of_lanes: scales as [lane / 4][c][p], and zeros likewise, if there are zero points.
DEVICE Group load_group(const u16 (&of_lanes)[8][8], const u8 (*zeros)[8], const Place& at, float offset, float zero_step) {
    const u32* scales = (const u32*)&of_lanes[at.lane / 4][at.tile_warp * row_tiles_of_warp * 2];
    u32 pairs[4]; // in one load
    if (TILE_WARPS == 1) *(uint4*)pairs = *(const uint4*)scales;
    else if (TILE_WARPS == 2) *(uint2*)pairs = *(const uint2*)scales;
    else pairs[0] = *scales;
    Group group;
    UNROLL
    for (int c = 0; c < row_tiles_of_warp; c++) {
        UNROLL
        for (int p = 0; p < 2; p++) {
            group.scale[c][p] = scale_value(pairs[c] >> (16 * p));
            group.distance[c][p] = offset;
            if (ZEROS) group.distance[c][p] -= zero_step * zeros[at.lane / 4][(at.tile_warp * row_tiles_of_warp + c) * 2 + p];
        }
    }
    return group;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// One word of each plane, for 16 of 64 columns: number r.
DEVICE void planes_of_step(const uint4 (&words)[PLANES], int r, u32 (&planes)[PLANES]) {
    UNROLL
    for (int d = 0; d < PLANES; d++) planes[d] = word(words[d], r);
#if ROUND && BITS < 8
    round_slice<BITS>(planes);
#endif
}

// Their fragments. Words are turned to bring this warp's rows to the place of the first ones: masks for it would take registers.
DEVICE void decode_step(const uint4 (&words)[PLANES], int r, const Place& at, u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4]) {
    u32 planes[PLANES];
    planes_of_step(words, r, planes);
    UNROLL
    for (int d = 0; d < BITS; d++)
        if (TILE_WARPS > 1) planes[d] = rotate_right(planes[d], at.tile_warp * row_tiles_of_warp * 2);
    Fragment::decode<row_tiles_of_warp>((const u32(&)[BITS])planes, fragment);
}
