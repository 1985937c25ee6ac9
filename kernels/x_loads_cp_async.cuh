// cp.async loads of gemm.cu's activations for mma.sync, and the sums of x over each group.
#pragma once
#include "gemm_smem.cuh"

// Byte offset of (token, column) in a k-tile of x; column is a multiple of 8. Linear: the offset of a sum is the sum of offsets.
DEVICE constexpr int x_offset(int token, int column) { return (token * kXStride + column) * 2; }

// Load x of `count` k-tiles from `k_tile` on; the last k-tile of an output tile is followed by the first one of the next tile.
DEVICE void load_x(const GemmArgs& args, SharedAddress to, int k_tile, int count) {
    constexpr int kVectors = kTileK / 8; // 16-byte vectors per row
    for (int i = threadIdx.x; i < kXRows * count * kVectors; i += kThreads) {
        const int token = i / kVectors % kXRows, slot = i / kVectors / kXRows, column = i % kVectors * 8;
        if (token >= args.tokens) continue; // this row only contributes to rows of y that are not stored
        int from_k_tile = k_tile + slot;
        while (from_k_tile >= args.k_tiles) from_k_tile -= args.k_tiles;
        const int from = from_k_tile * kTileK + column;
        const bool inside = from < args.depth; /*bug:x-bounds*/
        const u64 index = inside ? (u64)(GATHER ? args.x_rows[token] : token) * args.depth + from : 0;
        cp_async(to + slot * kXTileBytes + x_offset(token, column), args.x + index, inside ? 16 : 0);
    }
}

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    if (BFLOAT) mma_bf16(d, a, b0, b1, c);
    else mma_f16(d, a, b0, b1, c);
}

// B fragments of 32 columns (two k-steps) and one token tile. Of less than 8 rows, each stands for several tokens, all but one of which
// only contribute to rows of y that are not stored.
DEVICE void load_two_steps(SharedAddress x, int lane, u32 (&b)[4]) { ldmatrix_x4(b, x + x_offset(lane % min(kXRows, 8), lane / 8 * 8)); }

// B fragments of 16 columns and two token tiles. x: address of the first token.
DEVICE void load_two_tiles(SharedAddress x, int lane, u32 (&b)[4]) {
    ldmatrix_x4(b, x + x_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
}

constexpr u32 kOne = BFLOAT ? 0x3F803F80u : 0x3C003C00u;

// Add the sums of 16 columns of x to d, by an A fragment of ones; every row of d is the same.
DEVICE void add_sums(float (&d)[4], u32 b0, u32 b1, const float (&c)[4]) {
    const u32 ones[4] = {kOne, kOne, kOne, kOne};
    multiply(d, ones, b0, b1, c);
}

#if !OWN_SUMS
// Sum x over each group for `count` k-tiles and all tokens, by MMAs with a fragment of ones. All warps share the work.
DEVICE void sum_x(SharedAddress x, float (&sums)[kXStageTiles][WARPS_K][kGroups][kBlockM], int count, int lane, int warp) {
    for (int task = warp; task < count * WARPS_K * kGroups * kTokenTiles; task += kWarps) {
        const int tile = task % kTokenTiles, i = task / kTokenTiles % kGroups;
        const int warp_k = task / (kTokenTiles * kGroups) % WARPS_K, slot = task / (kTokenTiles * kGroups * WARPS_K);
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        UNROLL
        for (int step = 0; step < kStepsPerGroup; step += 2) {
            u32 b[4];
            load_two_steps(x + slot * kXTileBytes + x_offset(tile * 8, warp_k * kBlockK + i * kGroupK + step * kStepK), lane, b);
            add_sums(even, b[0], b[1], even);
            add_sums(odd, b[2], b[3], odd);
        }
        if (lane < 4) *(float2*)&sums[slot][warp_k][i][tile * 8 + 2 * lane] = make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
}
#endif

// Pipeline of x stages. Every member function is called by all threads of the block.
struct CpAsyncXPipeline {
    SharedAddress current, load; // stage in use, and the stage that the next load overwrites

    DEVICE_MEMBER void start(const GemmArgs& args, GemmSharedStorage& shared, u32 k_tile, u32 count) {
        current = shared_address(shared.x);
        load = current + kXStagesAhead * sizeof(shared.x[0]);
        load_x(args, current, k_tile, min(count, (u32)(kXStagesAhead * kXStageTiles)));
    }

    // Enter the next stage; this thread's copies into it have completed. left: k-tiles from its first one to the end of the block's range.
    DEVICE_MEMBER void enter_stage(const GemmArgs& args, GemmSharedStorage& shared, int lane, int warp, u32 k_tile, u32 left) {
        constexpr u32 kAhead = kXStagesAhead * kXStageTiles;
        __syncthreads(); /*bug:x-stage-full-sync*/ // all threads' copies are visible, and the previous stage is no longer read
        if (kAhead < left) load_x(args, load, k_tile + kAhead, min(left - kAhead, (u32)kXStageTiles));
#if !OWN_SUMS
        sum_x(current, shared.x_sums, min(left, (u32)kXStageTiles), lane, warp);
        __syncthreads(); /*bug:x-sums-sync*/
#endif
    }

    DEVICE_MEMBER void leave_stage(GemmSharedStorage& shared) {
        const SharedAddress first = shared_address(shared.x);
        load = current;
        current = current == first + kXStagesAhead * sizeof(shared.x[0]) ? first : current + sizeof(shared.x[0]);
    }
};
