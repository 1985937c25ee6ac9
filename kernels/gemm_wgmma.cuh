// The products of a chunk by wgmma, four warps together: each brings 16 of 64 rows at a time, and the tensor cores read the
// activations from shared memory by themselves, while the warps decode the next step's weights.
//
// Sums stay where the tensor cores add to them, and are kept in units of the scale of the group in work: where a group begins,
// they are multiplied by the old scale over the new one. (A second set of registers, as for mma.sync, there is no room for.)
#pragma once
#include "gemm_groups.cuh"
#include "wgmma.cuh"

static_assert(ROW_WARPS * TILE_WARPS % 4 == 0, "wgmma takes four warps that work on the same columns");

// What a warp has summed of a tile.
struct Sums {
    float total[accumulators][4];
    float scale[row_tiles_of_warp][2]; // in units of which the sums are

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++) scale[c][0] = scale[c][1] = 1;
    }

    DEVICE_MEMBER void add_chunk(const Weights& weights, SharedAddress x, const float (&x_sums)[groups][token_rows], const Place& at,
                                 float offset, float zero_step) {
        u32 fragment[2][Fragment::parts][row_tiles_of_warp][4]; // of a step, and of the one that the tensor cores may still read
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 words[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) words[d] = weights.planes[unit][d][at.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                decode_step(words, r, at, fragment[step % 2]); // beside the products of the step before
                if (step % steps_of_group == 0) {
                    const int i = step / steps_of_group;
                    const Group group = load_group(weights, at, i, offset, zero_step);
                    wait();
                    enter_group(group, x_sums[i], at.lane);
                }
                multiply_step(x + x_offset(0, step * 16), fragment[step % 2]);
            }
        }
        wait(); // the compiler lets products be under way where all threads go one way only, as they do not in copying
    }

    // Every sum times `gain` and in units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < accumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int c = j / TOKEN_TILES, p = e >> 1;
                total[j][e] *= gain / Fragment::unit(c, p) * scale[c][p];
            }
    }

  private:
    // Until all products are summed.
    DEVICE_MEMBER void wait() {
        wgmma_wait<0>();
        UNROLL
        for (int j = 0; j < accumulators; j++) wgmma_done(total[j]);
    }

    // The products of one step of 16 columns with all tokens. Those of the step before are summed when it returns, so that
    // their fragment may be written again.
    DEVICE_MEMBER void multiply_step(SharedAddress x, const u32 (&step)[Fragment::parts][row_tiles_of_warp][4]) {
        const WgmmaOperand tokens = wgmma_operand(x, token_rows * 16, 128);
        wgmma_fence();
        UNROLL
        for (int part = 0; part < Fragment::parts; part++)
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++) wgmma<TOKEN_TILES, BFLOAT>(total + c * TOKEN_TILES, step[part][c], tokens);
        wgmma_commit();
        wgmma_wait<1>();
    }

    // Sums in units of the group's scale, and what it adds beside the codes: X * shift.
    DEVICE_MEMBER void enter_group(const Group& group, const float (&x_sums)[token_rows], int lane) {
        float ratio[row_tiles_of_warp][2];
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                // A scale of 0, or one so small that no float16 holds it, must leave the sums finite; 2^-60 of it all is nothing.
                const float least = 0x1p-60f, next = fabsf(group.scale[c][p]) < least ? least : group.scale[c][p];
                ratio[c][p] = GROUP ? scale[c][p] * reciprocal(next) : 1.0f;
                scale[c][p] = next;
            }
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const float2 sum = *(const float2*)&x_sums[tile * 8 + 2 * (lane % 4)];
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++)
                UNROLL
                for (int e = 0; e < 4; e++) {
                    float& t = total[c * TOKEN_TILES + tile][e];
                    t = fmaf(t, ratio[c][e >> 1], (e & 1 ? sum.y : sum.x) * group.shift[c][e >> 1]);
                }
        }
    }
};
