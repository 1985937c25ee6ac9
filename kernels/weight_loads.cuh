// cp.async loads of gemm.cu's weights: planes, scales and zero points into the ring of each warp along N and K.
#pragma once
#include "gemm_smem.cuh"

// Position of the next load. Pointers are incremented: recomputing them for every k-tile would cost a fifth of all instructions.
struct LoadCursor {
    const uint4* planes; // this lane's 16 bytes of plane 0, first unit of the k-tile
    u32 tile, k_tile, stage;
    SharedAddress ring;
};

// Set the plane pointer at the start of an output tile.
DEVICE void seek_tile(const GemmArgs& args, const WarpCoord& coord, LoadCursor& next) {
    const u32 row_block = next.tile * kRowBlocks + coord.row_block, unit = (next.k_tile * WARPS_K + coord.warp_k) * kUnits;
    next.planes = args.planes + ((u64)row_block * args.units + unit) * 32 + coord.lane;
}

// Load the planes of a k-tile. full: all its units exist, as in every k-tile but the last of a row.
template <bool full>
DEVICE void load_planes(const GemmArgs& args, const WarpCoord& coord, const LoadCursor& next, SharedAddress to, int units) {
    const uint4* from = next.planes;
    UNROLL
    for (int plane = 0; plane < kPlanes; plane++) {
        if (plane > 0) from += args.plane_stride; /*bug:first-plane*/
        UNROLL
        for (int unit = 0; unit < kUnits; unit++) {
            const int i = plane * kUnits + unit;
            // Units beyond the last one keep old data, which is multiplied by x = 0.
            if ((ROW_BLOCK_WARPS == 1 || i % ROW_BLOCK_WARPS == coord.warp_in_row_block) && (full || unit < units))
                cp_async(to + (unit * kPlanes + plane) * sizeof(uint4[32]) + coord.lane * 16, from + unit * 32);
        }
    }
}

// Load the scales and zero points of a k-tile.
DEVICE void load_scales(const GemmArgs& args, const WarpCoord& coord, SharedAddress to, int row_block, int unit) {
    if (coord.warp_in_row_block != 0) return;
    const int part = coord.lane % 8;
    const SharedAddress scales = to + sizeof(uint4[kUnits][kPlanes][32]);
    UNROLL
    for (int i = coord.lane / 8; i < kGroups; i += 4) {
        const int column = unit * 64 + i * kGroupK;
        const bool inside = !GROUP || column < args.units * 64; // zero-filled beyond: a NaN scale would propagate through x = 0
        const u32 index = inside ? (GROUP ? column / max(GROUP, 1) : 0) * args.scale_row_blocks + row_block : 0; /*bug:scale-group*/
        cp_async(scales + i * 128 + part * 16, args.scales + (u64)index * 64 + part * 8, inside ? 16 : 0);
#if ZEROS
        if (part < 4) cp_async(scales + kGroups * 128 + i * 64 + part * 16, args.zeros + (u64)index * 64 + part * 16, inside ? 16 : 0);
#endif
    }
}

// Load the k-tile at the cursor, and advance the cursor to the next k-tile of the tile, or to the next tile.
DEVICE void load_weights(const GemmArgs& args, const WarpCoord& coord, LoadCursor& next) {
    const int row_block = (int)next.tile * kRowBlocks + coord.row_block, unit = ((int)next.k_tile * WARPS_K + coord.warp_k) * kUnits;
    const SharedAddress to = next.ring + next.stage * sizeof(WeightStage);
    if (row_block < args.row_blocks) {
        if (unit + kUnits <= args.units) load_planes<true>(args, coord, next, to, kUnits);
        else load_planes<false>(args, coord, next, to, args.units - unit);
        load_scales(args, coord, to, row_block, unit);
    }
    next.planes += WARPS_K * kUnits * 32;
    if (++next.stage == kNumStages) next.stage = 0; /*bug:ring-wrap*/
    if (++next.k_tile == (u32)args.k_tiles) {
        next.k_tile = 0;
        next.tile++;
        seek_tile(args, coord, next);
    }
}

// Prefetch the first k-tiles of this block into L2 while earlier kernels end, as far as they belong to its first tile. Each lane
// prefetches one of the four cache lines of a unit.
DEVICE void prefetch_weights(const GemmArgs& args, const WarpCoord& coord, const LoadCursor& first, int count) {
    const int row_block = (int)first.tile * kRowBlocks + coord.row_block;
    if (row_block >= args.row_blocks) return;
    for (int i = coord.lane / 4; i < count * kUnits; i += 8) {
        const int unit = (((int)first.k_tile + i / kUnits) * WARPS_K + coord.warp_k) * kUnits + i % kUnits;
        if (unit >= args.units) return;
        const uint4* line = args.planes + ((u64)row_block * args.units + unit) * 32 + coord.lane % 4 * 8;
        UNROLL
        for (int plane = 0; plane < kPlanes; plane++)
            if (ROW_BLOCK_WARPS == 1 || plane % ROW_BLOCK_WARPS == coord.warp_in_row_block) prefetch_l2(line + plane * args.plane_stride);
        const int group = GROUP ? unit * 64 / max(GROUP, 1) : 0;
        if (coord.warp_in_row_block == 0) prefetch_l2(args.scales + ((u64)group * args.scale_row_blocks + row_block) * 64);
    }
}
