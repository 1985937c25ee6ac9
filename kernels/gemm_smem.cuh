// Shared memory of gemm.cu.
#pragma once
#include "gemm_config.cuh"

constexpr int kXStride = kTileK + 8; // elements per row of x for mma.sync: 16 bytes of padding make ldmatrix free of bank conflicts
constexpr int kXTileBytes = (WGMMA ? kTileK : kXStride) * kXRows * 2; // x of one k-tile
constexpr int kXStageTiles = X_STAGE_TILES;                                    // k-tiles per x stage
constexpr int kXStagesAhead = (kNumStages - 1 + kXStageTiles - 1) / kXStageTiles; // as far ahead as the weights
constexpr int kXStages = kXStagesAhead + 1;

// Weights of one k-tile for one ring: the warps that share 64 rows and the columns of one warp along K.
struct WeightStage {
    uint4 planes[kUnits][kPlanes][32];
    u16 scales[kGroups][8][8]; // [group][lane / 4][c, p]
#if ZEROS
    u8 zeros[kGroups][8][8];
#endif

    // Affine parameters of a warp's rows in one group.
    DEVICE_MEMBER GroupScales<kRowTiles> load_group(int group, const WarpCoord& coord, float offset, float zero_step) const {
        const int first = coord.warp_in_row_block * kRowTiles * 2;
#if ZEROS
        const u8* of_zeros = zeros[group][coord.lane / 4];
#else
        const u8* of_zeros = nullptr;
#endif
        return load_group_scales<kRowTiles>(scales[group][coord.lane / 4], of_zeros, first, offset, zero_step);
    }
};

struct GemmSharedStorage {
    alignas(16) u8 x[kXStages][kXStageTiles][kXTileBytes]; // first: the swizzled tiles of TMA need an alignment of 1024 bytes
    WeightStage ring[WARPS_K][kRowBlocks][kNumStages];
#if WARPS_K > 1
    float4 partial_sums[WARPS_K][kWarpsN][kAccumulators][32];
#endif
#if CLUSTER > 1
    float4 cluster_sums[CLUSTER][kWarpsN][kClusterShares][32]; // from each block of the cluster, those that this block adds up
    alignas(16) u64 cluster_barrier; // completes when they have arrived
#endif
#if WGMMA
    alignas(16) u64 x_full_barriers[kXStages];
#endif
#if !WGMMA && !OWN_SUMS
    float x_sums[kXStageTiles][WARPS_K][kGroups][kBlockM]; // sums of x over each group

    DEVICE_MEMBER float2 group_sums(u32 slot, int warp_k, int group, int token) const { return *(const float2*)&x_sums[slot][warp_k][group][token]; }
#else
    DEVICE_MEMBER float2 group_sums(u32, int, int, int) const { return make_float2(0, 0); }
#endif
#if GATHER
    int x_rows[kBlockM], y_rows[kBlockM]; // of the tokens of the block's tile
#endif
};

#ifdef SHARED_BYTES
static_assert(sizeof(GemmSharedStorage) == SHARED_BYTES, "SHARED_BYTES of the launcher must equal sizeof(GemmSharedStorage)");
#endif
