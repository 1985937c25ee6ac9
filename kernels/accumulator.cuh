// Float32 accumulators of one warp for one output tile, and the WGMMAs that add to them.
#pragma once
#include "gemm_config.cuh"

// value[c * kTokenTiles + t]: row tile c and token tile t, in the accumulator layout of mma.m16n8k16.
struct Accumulator {
    float value[kAccumulators][4];

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < kAccumulators; j++) value[j][0] = value[j][1] = value[j][2] = value[j][3] = 0;
#if WGMMA
        fence();
#endif
    }

#if WGMMA
    // Issue the WGMMAs of one k-step with all tokens as one group, then wait for the previous group. Its fragments may be
    // overwritten after the call. x: the k-step's columns in shared memory. parts: fragments per row tile.
    template <int parts> DEVICE_MEMBER void multiply_step(SharedAddress x, const StepFragments& step) {
        const WgmmaDescriptor b = wgmma_descriptor(x);
        wgmma_fence(); /*bug:wgmma-fence*/
        UNROLL
        for (int part = 0; part < parts; part++)
            UNROLL
            for (int c = 0; c < kRowTiles; c++) wgmma<kTokenTiles, BFLOAT>(value + c * kTokenTiles, step[part][c], b);
        wgmma_commit();
        wgmma_wait<1>(); /*bug:fragment-wait*/
    }

    // The same for consecutive k-steps with one fragment per row tile.
    template <int steps> DEVICE_MEMBER void multiply_steps(SharedAddress x, const u32 (&fragments)[steps][kRowTiles][4]) {
        wgmma_fence();
        UNROLL
        for (int step = 0; step < steps; step++)
            UNROLL
            for (int c = 0; c < kRowTiles; c++)
                wgmma<kTokenTiles, BFLOAT>(value + c * kTokenTiles, fragments[step][c], wgmma_descriptor(x + step * 32));
        wgmma_commit();
        wgmma_wait<1>(); /*bug:batch-wait*/
    }

    // Wait for all issued WGMMAs.
    DEVICE_MEMBER void wait() {
        wgmma_wait<0>();
        fence();
    }

    DEVICE_MEMBER void fence() {
        UNROLL
        for (int j = 0; j < kAccumulators; j++) warpgroup_fence_operand(value[j]);
    }
#endif
};
