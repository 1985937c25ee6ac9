// TMA loads of gemm.cu's activations for WGMMA.
#pragma once
#include "gemm_smem.cuh"

static_assert(kXUnitBytes % kSwizzleAlignment == 0, "every x tile must have the alignment of the 128-byte swizzle");

// Pipeline of x stages with one full barrier each; thread 0 issues the loads. Every member function is called by all threads of the
// block.
struct TmaXPipeline {
    SharedAddress current;
    u32 index, parity; // of the stage in use

    DEVICE_MEMBER void start(const GemmArgs& args, GemmSharedStorage& shared, u32 k_tile, u32 count) {
        current = shared_address(shared.x);
        index = parity = 0;
        if (threadIdx.x == 0)
            for (int i = 0; i < kXStages; i++) mbarrier_init(shared_address(shared.x_full_barriers + i), 1);
        __syncthreads();
        if (threadIdx.x == 0)
            for (u32 i = 0; i < kXStagesAhead && i * kXStageTiles < count; i++)
                produce(args, shared, i, k_tile + i * kXStageTiles, min(count - i * kXStageTiles, (u32)kXStageTiles));
    }

    // Enter the next stage. left: k-tiles from its first one to the end of the block's range.
    DEVICE_MEMBER void enter_stage(const GemmArgs& args, GemmSharedStorage& shared, int, int, u32 k_tile, u32 left) {
        constexpr u32 kAhead = kXStagesAhead * kXStageTiles;
        __syncthreads(); /*bug:x-stage-empty-sync*/ // the previous stage is no longer read
        if (threadIdx.x == 0 && kAhead < left)
            produce(args, shared, index == 0 ? kXStages - 1 : index - 1, k_tile + kAhead, min(left - kAhead, (u32)kXStageTiles));
        mbarrier_wait(shared_address(shared.x_full_barriers + index), parity); /*bug:x-full-wait*/
    }

    DEVICE_MEMBER void leave_stage(GemmSharedStorage& shared) {
        current += sizeof(shared.x[0]);
        if (++index < kXStages) return;
        current = shared_address(shared.x);
        index = 0;
        parity ^= 1; /*bug:x-parity*/
    }

  private:
    // Load `count` k-tiles from `k_tile` on; the last k-tile of an output tile is followed by the first one of the next tile.
    static DEVICE_MEMBER void produce(const GemmArgs& args, GemmSharedStorage& shared, u32 stage, u32 k_tile, u32 count) {
        const SharedAddress full_barrier = shared_address(shared.x_full_barriers + stage);
        mbarrier_arrive_expect_tx(full_barrier, count * kXTileBytes); /*bug:x-expect-bytes*/
        for (u32 slot = 0; slot < count; slot++, k_tile++) {
            while (k_tile >= (u32)args.k_tiles) k_tile -= args.k_tiles;
            for (int unit = 0; unit < kTileK / 64; unit++) {
                const SharedAddress to = shared_address(shared.x[stage][slot] + unit * kXUnitBytes);
                tma_load_2d(to, args.x, 0, (int)k_tile * kTileK + unit * 64, full_barrier);
            }
        }
    }
};
