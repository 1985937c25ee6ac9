// What both ways of multiplying need of a chunk beside the products: fragments, scales, and sums of activations.
#pragma once
#include "gemm_shape.cuh"

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    if (BFLOAT) mma_bfloat(d, a, b0, b1, c);
    else mma_half(d, a, b0, b1, c);
}

// Activations of 32 columns, for one tile of 8 tokens.
DEVICE void load_two_steps(SharedAddress x, int lane, u32 (&b)[4]) { load_matrices(b, x + x_offset(lane % 8, lane / 8 * 8)); }

// Sums of x over each group, for `count` chunks and all tokens: the warps share them out.
DEVICE void sum_x(SharedAddress x, float (&sums)[PANEL][K_WARPS][groups][token_rows], int count, int lane, int warp) {
    const u32 one = BFLOAT ? 0x3F803F80u : 0x3C003C00u, ones[4] = {one, one, one, one};
    for (int task = warp; task < count * K_WARPS * groups * TOKEN_TILES; task += warps) {
        const int tile = task % TOKEN_TILES, i = task / TOKEN_TILES % groups;
        const int k_warp = task / (TOKEN_TILES * groups) % K_WARPS, slot = task / (TOKEN_TILES * groups * K_WARPS);
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        UNROLL
        for (int step = 0; step < steps_of_group; step += 2) {
            u32 b[4];
            load_two_steps(x + slot * x_bytes + x_offset(tile * 8, k_warp * columns + i * group + step * 16), lane, b);
            multiply(even, ones, b[0], b[1], even);
            multiply(odd, ones, b[2], b[3], odd);
        }
        if (lane < 4) *(float2*)&sums[slot][k_warp][i][tile * 8 + 2 * lane] = make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
}

DEVICE float scale_value(u32 bits) { return SCALE_BFLOAT ? bfloat_to_float((u16)bits) : half_to_float((u16)bits); }

// Scales of a warp's rows 16c + 8p + lane / 4 in one group, and what an activation adds to their products beside the codes.
struct Group {
    float scale[row_tiles_of_warp][2], shift[row_tiles_of_warp][2];
};

DEVICE Group load_group(const Weights& weights, const Place& at, int i, float offset, float zero_step) {
    const u32* scales = (const u32*)&weights.scales[i][at.lane / 4][at.tile_warp * row_tiles_of_warp * 2];
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
            float distance = offset;
#if ZEROS
            distance -= zero_step * weights.zeros[i][at.lane / 4][(at.tile_warp * row_tiles_of_warp + c) * 2 + p];
#endif
            group.shift[c][p] = distance * Fragment::unit(c, p) - Fragment::bias();
        }
    }
    return group;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The fragments of 16 columns of a warp's rows. words: of 64 columns; r: which 16 of them.
DEVICE void decode_step(const uint4 (&words)[PLANES], int r, const Place& at, u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4]) {
    u32 planes[PLANES];
    UNROLL
    for (int d = 0; d < PLANES; d++) {
        planes[d] = word(words[d], r);
        // Brings this warp's rows to the place of the first ones.
        if (TILE_WARPS > 1) planes[d] = rotate_right(planes[d], at.tile_warp * row_tiles_of_warp * 2);
    }
#if ROUND && BITS < 8
    round_slice<BITS>(planes);
#endif
    Fragment::decode<row_tiles_of_warp>((const u32(&)[BITS])planes, fragment);
}
