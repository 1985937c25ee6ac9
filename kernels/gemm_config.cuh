// Compile-time configuration of the GEMM kernels, their arguments, and the coordinates of a warp.
//
// The macros are documented in gemm.cu. y[M, N] = x[M, K] W[N, K]^T with M = tokens, N = rows of W, K = depth. The tensor cores
// compute the transposed product, so rows of W are the M dimension of an MMA and tokens its N dimension.
#pragma once
#include "group_scales.cuh"
#include "hopper.cuh"
#include "plane_words.cuh"

#ifndef CLUSTER
#define CLUSTER 1
#endif
// 1 in gemm_sm90_ws.cu: every output tile has one block, with no stream-K.
#ifndef WHOLE_TILES
#define WHOLE_TILES 0
#endif
// 1 if each warp of mma.sync adds up x itself: 1 MMA more for each 4 / ROW_BLOCK_WARPS, and no barrier.
#define OWN_SUMS (!WGMMA && BLOCK_M * ROW_BLOCK_WARPS <= 16)
#ifndef X_ROWS
#define X_ROWS BLOCK_M
#endif
// 1 in moe_gemm.cu: rows of x and of y are those of a list.
#ifndef GATHER
#define GATHER 0
#endif

constexpr int kBlockM = BLOCK_M;           // tokens of an output tile
constexpr int kBlockN = BLOCK_N;           // rows of an output tile
constexpr int kBlockK = BLOCK_K;           // columns of a k-tile, per warp along K
constexpr int kTileK = kBlockK * WARPS_K;  // columns of a k-tile
constexpr int kTokenTiles = kBlockM / 8;   // tiles of 8 tokens of an output tile
constexpr int kRowBlocks = kBlockN / 64;   // 64-row blocks of an output tile
constexpr int kUnits = kBlockK / 64;       // 64-column units of a k-tile, per warp along K
constexpr int kXUnitBytes = kBlockM * 128; // x of 64 columns, as a swizzled TMA box
constexpr int kNumStages = STAGES;         // pipeline stages of the weights
constexpr int kWarpsN = kRowBlocks * ROW_BLOCK_WARPS; // warps along N
constexpr int kWarps = kWarpsN * WARPS_K;  // warps that execute MMAs
constexpr int kThreads = 32 * kWarps;
constexpr int kRowTiles = 4 / ROW_BLOCK_WARPS;  // 16-row tiles of a warp
constexpr int kAccumulators = kRowTiles * kTokenTiles; // 16x8 accumulators of a warp, 4 floats per lane each
constexpr int kClusterShares = (kAccumulators + CLUSTER - 1) / CLUSTER; // of a warp's accumulators: those that one block of a cluster adds up
constexpr bool kOwnSums = OWN_SUMS;
constexpr int kXRows = X_ROWS;             // tokens of x in shared memory

constexpr int kGroupK = GROUP && GROUP < kBlockK ? GROUP : kBlockK; // columns of a k-tile that share a scale
constexpr int kGroups = kBlockK / kGroupK;
constexpr int kStepsPerGroup = kGroupK / kStepK;

typedef Fragments<BITS, BFLOAT, STRETCH> Fragment;
typedef u32 StepFragments[Fragment::kParts][kRowTiles][4]; // A fragments of one k-step

#if WGMMA
typedef TensorMap Activations;
#else
typedef u16 Activations;
#endif

struct GemmArgs {
    const uint4* planes;
    u64 plane_stride;
    const u16* scales;
    const u8* zeros;
    const Activations* x;
    int tokens, rows, depth; // M, N, K
    int row_blocks;          // 64-row blocks of W
    int scale_row_blocks;    // those between the scales of two groups: more than W has if W is a part of a stored weight
    int units;               // 64-column units of W
    int k_tiles;             // of an output tile
    const int* x_rows;       // row of x of each token; used if GATHER
};

// Lane, and warp along N (the row block of the tile, then the warp in it) and along K.
struct WarpCoord {
    int lane, row_block, warp_in_row_block, warp_k;

    // Index among the warps along N.
    DEVICE_MEMBER int warp_n() const { return row_block * ROW_BLOCK_WARPS + warp_in_row_block; }
};
