// Pipeline of gemm.cu and moe_gemm.cu: the k-tiles of one block, with weights and x loaded ahead of the products.
#pragma once
#include "warp_fragments.cuh"
#include "weight_loads.cuh"
#if WGMMA
#include "gemm_wgmma.cuh"
typedef WgmmaMainloop Mainloop;
typedef TmaXPipeline XPipeline;
#else
#include "gemm_mma.cuh"
typedef MmaMainloop Mainloop;
typedef CpAsyncXPipeline XPipeline;
#endif

DEVICE WarpCoord warp_coord() {
    const int warp = threadIdx.x / 32;
    return {(int)threadIdx.x % 32, warp % kRowBlocks, warp / kRowBlocks % ROW_BLOCK_WARPS, WARPS_K > 1 ? warp / kWarpsN : 0};
}

// Synchronize the warps that share a ring.
DEVICE void sync_ring(const WarpCoord& coord) {
    if (ROW_BLOCK_WARPS == 1) __syncwarp();
    else named_barrier_sync(1 + coord.warp_k * kRowBlocks + coord.row_block, 32 * ROW_BLOCK_WARPS);
}

// Multiply `count` k-tiles of consecutive output tiles, from k-tile `k_tile` of the first one on.
//
// next: cursor at the first k-tile. store(i, mainloop) is called at the end of the block's part of its i-th output tile; in a cluster
// once, also by a block without k-tiles.
template <class Store>
DEVICE void multiply_k_tiles(const GemmArgs& args, GemmSharedStorage& shared, const WarpCoord& coord, u32 k_tile, u32 count, LoadCursor& next,
                             float offset, float zero_step, const Store& store) {
    const int warp = threadIdx.x / 32;
    const WeightStage(&ring)[kNumStages] = shared.ring[coord.warp_k][coord.row_block];
    XPipeline x_pipeline;
    x_pipeline.start(args, shared, k_tile, count);
    cp_async_commit();
    _Pragma("unroll 1") for (u32 i = 0; i < kNumStages - 1; i++) {
        if (i < count) load_weights(args, coord, next);
        cp_async_commit(); // possibly an empty group, so that every iteration commits exactly one
    }

    Mainloop mainloop;
    mainloop.clear();
    u32 stage = 0, slot = 0, tile = 0;
    for (u32 i = 0; i < count; i++) {
        cp_async_wait<kNumStages - 2>(); /*bug:ring-wait*/ // this thread's copies of the k-tile's weights and of its x stage
        if (slot == 0) x_pipeline.enter_stage(args, shared, coord.lane, warp, k_tile, count - i);
        sync_ring(coord); /*bug:ring-sync*/ // the k-tile's weights are visible, and the previous k-tile is no longer read
        if (i + kNumStages - 1 < count) load_weights(args, coord, next);
        cp_async_commit();
        mainloop.add_k_tile(ring[stage], shared, x_pipeline.current, slot, coord, offset, zero_step);
        if (++stage == kNumStages) stage = 0;
        if (++slot == kXStageTiles) {
            slot = 0;
            x_pipeline.leave_stage(shared);
        }
        k_tile++;
        if (CLUSTER == 1 && (k_tile == (u32)args.k_tiles || i + 1 == count)) {
            store(tile, mainloop);
            mainloop.clear(); /*bug:clear-accumulator*/
            k_tile = 0;
            tile++;
        }
    }
    cp_async_wait<0>(); /*bug:final-wait*/
    if (CLUSTER > 1) store(0, mainloop);
}
