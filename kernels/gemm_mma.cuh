// Mainloop of gemm.cu by mma.sync, for up to 64 tokens, from sm_80 on.
//
// Codes are multiplied as integers. The products of a group have accumulators of their own, which are scaled and added to the
// tile's accumulators at the end of the group. Offset and zero point enter through the sums of x over the group. For few tokens each warp
// adds x up itself, by MMAs with a fragment of ones (kOwnSums); else the block does it once for all warps (x_loads_cp_async.cuh).
#pragma once
#include "accumulator.cuh"
#include "warp_fragments.cuh"
#include "x_loads_cp_async.cuh"

struct MmaMainloop {
    Accumulator accumulator;

    DEVICE_MEMBER void clear() { accumulator.clear(); }

    // Add the products of one k-tile. x_stage: address of the x stage. slot: the k-tile's index in it.
    DEVICE_MEMBER void add_k_tile(const WeightStage& weights, GemmSharedStorage& shared, SharedAddress x_stage, u32 slot,
                                  const WarpCoord& coord, float offset, float zero_step) {
        const SharedAddress x = x_stage + slot * kXTileBytes + x_offset(0, coord.warp_k * kBlockK);
        float product[kAccumulators][4], own_sums[kTokenTiles][4];
        u32 b[4];
        UNROLL
        for (int unit = 0; unit < kUnits; unit++) {
            uint4 words[kPlanes];
            UNROLL
            for (int d = 0; d < kPlanes; d++) words[d] = weights.planes[unit][d][coord.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                StepFragments fragment;
                unpack_rotated_words(words, r, coord, fragment);
                const bool first = step % kStepsPerGroup == 0;
                multiply_step(x + x_offset(0, step * kStepK), coord.lane, first, r % 2 == 0, fragment, b, product, own_sums);
                if (step % kStepsPerGroup == kStepsPerGroup - 1) {
                    const int i = step / kStepsPerGroup;
                    float2 sums[kTokenTiles];
                    UNROLL
                    for (int tile = 0; tile < kTokenTiles; tile++) sums[tile] = group_sums(shared, slot, coord, i, tile, own_sums[tile]);
                    add_group(weights.load_group(i, coord, offset, zero_step), sums, product);
                }
            }
        }
    }

    // Scale the accumulators to units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < kAccumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) accumulator.value[j][e] *= gain / Fragment::code_scale(j / kTokenTiles, e >> 1);
    }

  private:
    // MMAs of one k-step with all tokens. `first` overwrites `product`.
    static DEVICE_MEMBER void multiply_step(SharedAddress x, int lane, bool first, bool even, const StepFragments& fragment, u32 (&b)[4],
                                            float (&product)[kAccumulators][4], float (&own_sums)[kTokenTiles][4]) {
        const float zero[4] = {0, 0, 0, 0};
        UNROLL
        for (int tile = 0; tile < kTokenTiles; tile++) {
            if (kTokenTiles == 1) {
                if (even) load_two_steps(x, lane, b);
            } else if (tile % 2 == 0) {
                load_two_tiles(x + x_offset(tile * 8, 0), lane, b);
            }
            const int half = kTokenTiles == 1 ? (even ? 0 : 2) : tile % 2 * 2;
            if (kOwnSums) {
                if (first) add_sums(own_sums[tile], b[half], b[half + 1], zero);
                else add_sums(own_sums[tile], b[half], b[half + 1], own_sums[tile]); /*bug:own-sums*/
            }
            UNROLL
            for (int part = 0; part < Fragment::kParts; part++)
                UNROLL
                for (int c = 0; c < kRowTiles; c++) {
                    float(&sum)[4] = product[c * kTokenTiles + tile];
                    if (first && part == 0) multiply(sum, fragment[part][c], b[half], b[half + 1], zero);
                    else multiply(sum, fragment[part][c], b[half], b[half + 1], sum);
                }
        }
    }

    // Sums of x over group `group` of the k-tile for the two tokens of this lane in a token tile.
    static DEVICE_MEMBER float2 group_sums(const GemmSharedStorage& shared, u32 slot, const WarpCoord& coord, int group, int tile,
                                           const float (&own)[4]) {
        if (kOwnSums) return make_float2(own[0], own[1]);
        return shared.group_sums(slot, coord.warp_k, group, tile * 8 + 2 * (coord.lane % 4));
    }

    // accumulator += scale * (product + sum of x * shift) for one group.
    DEVICE_MEMBER void add_group(const GroupScales<kRowTiles>& group, const float2 (&sums)[kTokenTiles], const float (&product)[kAccumulators][4]) {
        float shift[kRowTiles][2];
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int p = 0; p < 2; p++) shift[c][p] = group.code_bias[c][p] * Fragment::code_scale(c, p) - Fragment::fragment_bias();
        UNROLL
        for (int tile = 0; tile < kTokenTiles; tile++) {
            const float2 sum = sums[tile];
            UNROLL
            for (int c = 0; c < kRowTiles; c++)
                UNROLL
                for (int e = 0; e < 4; e++) {
                    const int j = c * kTokenTiles + tile, p = e >> 1;
                    accumulator.value[j][e] =
                        fmaf(group.scale[c][p], fmaf(e & 1 ? sum.y : sum.x, shift[c][p], product[j][e]), accumulator.value[j][e]);
                }
        }
    }
};
