// Mainloop of gemm.cu by WGMMA, for 17 to 64 tokens, on sm_90a. The warps dequantize k-step i + 1 while the tensor cores execute
// step i with x from shared memory.
//
// Offset and zero point are folded into the operand (zero_point.cuh). The accumulators are kept in units of the current group's scale:
// at the start of a group they are multiplied by old scale / new scale. Registers do not suffice for a second set of accumulators.
#pragma once
#include "accumulator.cuh"
#include "warp_fragments.cuh"
#include "x_loads_tma.cuh"
#include "zero_point.cuh"

static_assert(kWarpsN % 4 == 0, "a warpgroup is four warps that share their columns");

struct WgmmaMainloop {
    Accumulator accumulator;
    float scale[kRowTiles][2]; // unit of the accumulators

    DEVICE_MEMBER void clear() {
        accumulator.clear();
        UNROLL
        for (int c = 0; c < kRowTiles; c++) scale[c][0] = scale[c][1] = 1;
    }

    // Add the products of one k-tile. x_stage: address of the x stage. slot: the k-tile's index in it.
    DEVICE_MEMBER void add_k_tile(const WeightStage& weights, GemmSharedStorage&, SharedAddress x_stage, u32 slot, const WarpCoord& coord,
                                  float offset, float zero_step) {
        const SharedAddress x = x_stage + slot * kXTileBytes + coord.warp_k * kUnits * kXUnitBytes;
        StepFragments fragment[2]; // double buffer: WGMMA may still read the previous step
        ZeroPointFolding zero_point;
        UNROLL
        for (int unit = 0; unit < kUnits; unit++) {
            uint4 words[kPlanes];
            UNROLL
            for (int d = 0; d < kPlanes; d++) words[d] = weights.planes[unit][d][coord.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                const bool group_starts = step % kStepsPerGroup == 0;
                GroupScales<kRowTiles> group;
                if (group_starts) {
                    group = weights.load_group(step / kStepsPerGroup, coord, offset, zero_step);
                    zero_point.set(group);
                }
                unpack_rotated_words(words, r, coord, fragment[step % 2]); // overlaps with the previous step's WGMMAs
                zero_point.apply(fragment[step % 2]);
                if (group_starts && (GROUP || step == 0)) rescale(group);
                accumulator.multiply_step<Fragment::kParts>(x + unit * kXUnitBytes + r * 32, fragment[step % 2]);
            }
        }
        // ptxas serializes WGMMA across divergent control flow (C7518), which the loads have: drain before them.
        accumulator.wait(); /*bug:k-tile-wait*/
    }

    // Scale the accumulators to units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < kAccumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int c = j / kTokenTiles, p = e >> 1;
                accumulator.value[j][e] *= gain / ZeroPointFolding::code_scale(c, p) * scale[c][p];
            }
    }

  private:
    // Convert the accumulators to units of the group's scale.
    DEVICE_MEMBER void rescale(const GroupScales<kRowTiles>& group) {
        float ratio[kRowTiles][2];
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                // A scale of 0 must not make the accumulators infinite. Products in units of 2^-60 are negligible.
                const float least = 0x1p-60f, next = fabsf(group.scale[c][p]) < least ? least : group.scale[c][p];
                ratio[c][p] = scale[c][p] * reciprocal_approx(next); /*bug:scale-ratio*/
                scale[c][p] = next;
            }
        if (!GROUP) return; // one scale per row: the accumulators are 0 before the first k-tile, and the ratio is 1 afterwards
        accumulator.wait(); /*bug:rescale-wait*/
        UNROLL
        for (int j = 0; j < kAccumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) accumulator.value[j][e] *= ratio[j / kTokenTiles][e >> 1];
    }
};
