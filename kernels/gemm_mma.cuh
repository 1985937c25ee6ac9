// The products of a chunk by mma.sync, each warp on its own: codes are multiplied as they are, and what a group gives is
// scaled and added up in other registers.
#pragma once
#include "gemm_groups.cuh"

// Activations of 16 columns, as B fragments of two tiles of 8 tokens. x: of the first of them.
DEVICE void load_two_tiles(SharedAddress x, int lane, u32 (&b)[4]) {
    load_matrices(b, x + x_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
}

// What a warp has summed of a tile.
struct Sums {
    float total[accumulators][4];

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
    }

    DEVICE_MEMBER void add_chunk(const Weights& weights, SharedAddress x, const float (&x_sums)[groups][token_rows], const Place& at,
                                 float offset, float zero_step) {
        float product[accumulators][4];
        u32 b[4];
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 words[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) words[d] = weights.planes[unit][d][at.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                u32 fragment[Fragment::parts][row_tiles_of_warp][4];
                decode_step(words, r, at, fragment);
                multiply_step(x + x_offset(0, step * 16), at.lane, step % steps_of_group == 0, r % 2 == 0, fragment, b, product);
                if (step % steps_of_group == steps_of_group - 1) {
                    const int i = step / steps_of_group;
                    scale_group(load_group(weights, at, i, offset, zero_step), x_sums[i], at.lane, product);
                }
            }
        }
    }

    // Every sum times `gain` and in units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < accumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) total[j][e] *= gain / Fragment::unit(j / TOKEN_TILES, e >> 1);
    }

  private:
    // The products of one step of 16 columns with all tokens; `first` starts new sums.
    static DEVICE_MEMBER void multiply_step(SharedAddress x, int lane, bool first, bool even,
                                            const u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4], u32 (&b)[4],
                                            float (&product)[accumulators][4]) {
        const float nothing[4] = {0, 0, 0, 0};
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            if (TOKEN_TILES == 1) {
                if (even) load_two_steps(x, lane, b);
            } else if (tile % 2 == 0) {
                load_two_tiles(x + x_offset(tile * 8, 0), lane, b);
            }
            const int half = TOKEN_TILES == 1 ? (even ? 0 : 2) : tile % 2 * 2;
            UNROLL
            for (int part = 0; part < Fragment::parts; part++)
                UNROLL
                for (int c = 0; c < row_tiles_of_warp; c++) {
                    float(&sum)[4] = product[c * TOKEN_TILES + tile];
                    if (first && part == 0) multiply(sum, fragment[part][c], b[half], b[half + 1], nothing);
                    else multiply(sum, fragment[part][c], b[half], b[half + 1], sum);
                }
        }
    }

    // total += scale * (product + X * shift) for one group.
    DEVICE_MEMBER void scale_group(const Group& group, const float (&x_sums)[token_rows], int lane, const float (&product)[accumulators][4]) {
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const float2 sum = *(const float2*)&x_sums[tile * 8 + 2 * (lane % 4)];
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++)
                UNROLL
                for (int e = 0; e < 4; e++) {
                    const int j = c * TOKEN_TILES + tile, p = e >> 1;
                    total[j][e] = fmaf(group.scale[c][p], fmaf(e & 1 ? sum.y : sum.x, group.shift[c][p], product[j][e]), total[j][e]);
                }
        }
    }
};
