// Nested GEMM: y[M, N] = x[M, K] W[N, K]^T + bias with W in bit planes, of which the kernel reads the first BITS. M <= BLOCK_M.
// More tokens on sm_90a: gemm_sm90_ws.cu.
//
// Weight value: gain * scale * (2^(8 - BITS) * code + offset - zero point), with one scale and zero point per group. `code` is the slice
// of BITS bits of an 8-bit code, its bits after the fourth times STRETCH / 4. Codes of fewer master bits are the first planes of an 8-bit code; `gain` and `offset` are adapted.
//
// Tiling
//   An output tile has BLOCK_M tokens and BLOCK_N rows. A block has BLOCK_N / 64 * ROW_BLOCK_WARPS warps along N (each row block
//   of 64 rows is split among ROW_BLOCK_WARPS warps) and WARPS_K warps along K. A k-tile has BLOCK_K columns per warp along K,
//   BLOCK_K * WARPS_K in all. The warps along K are reduced through shared memory (sliced K).
// Schedule
//   CLUSTER > 1: the blocks of a cluster share an output tile, each with an equal contiguous range of its k-tiles, and exchange partial sums
//   through distributed shared memory. Fast for matrices of few k-tiles: it needs no exchange through global memory.
//   CLUSTER = 1, stream-K: the k-tiles of all output tiles, tile by tile, are split into equal contiguous ranges, one per block. A range may start or
//   end within a tile. If several blocks share a tile, each stores partial sums to the workspace. The last warp to arrive at the tile's
//   semaphore reduces them in a fixed order and resets the semaphore to 0.
// Pipeline
//   Weights are loaded by cp.async, STAGES - 1 k-tiles ahead, into a ring in shared memory that belongs to the ROW_BLOCK_WARPS warps
//   of a row block, so a k-tile needs no block-wide barrier. x belongs to the whole block. It is loaded in x stages of
//   X_STAGE_TILES k-tiles, at least as far ahead as the weights; the block synchronizes once or twice per x stage.
// Mainloop
//   mma.sync (gemm_mma.cuh): codes stay integers in the tensor cores (fragments.cuh). With t = sum of x * fragment and X = sum of x over a
//   group, the group contributes  scale / code_scale * 2^(8 - BITS) * (t + X * (code_scale * (offset - zero) / 2^(8 - BITS) - bias)).
//   X is computed once per block by MMAs with a fragment of ones.
//   WGMMA: gemm_wgmma.cuh.
//
// Macros
//   BITS          2..8, planes of the slice
//   ROUND         1 for `round` slicing, which reads one plane more; 0 for `msb`
//   STRETCH       steps of the fifth and later planes in quarters of halves: 4, or with BITS > 4 and `msb` slicing 5 or 6
//   GROUP         group size: 32, a multiple of 64, or 0 for one scale per row
//   ZEROS         1 if groups have zero points
//   BFLOAT        1 if x, bias and y are bfloat16; 0 for float16
//   SCALE_BFLOAT  1 if scales are bfloat16; 0 for float16
//   BLOCK_M       tokens of an output tile: 8, 16, 32 or 64
//   BLOCK_N       rows of an output tile, a multiple of 64
//   BLOCK_K       columns of a k-tile per warp along K: 64, 128 or 256
//   ROW_BLOCK_WARPS  1, 2 or 4: warps per 64-row block
//   WARPS_K       warps along K
//   STAGES        >= 2: pipeline stages of the weights
//   X_STAGE_TILES >= 1: k-tiles per x stage
//   BLOCKS_PER_SM resident blocks per multiprocessor, the second number of __launch_bounds__
//   CLUSTER       2..8: blocks that share an output tile, on sm_90 and later; 1 for stream-K
//   X_ROWS        optional: tokens of x in shared memory, 1 or BLOCK_M (the default); fewer leave room for weights. 1 for one token
//   WGMMA         1 for WGMMA, on sm_90a with BLOCK_M 16, 32 or 64 and whole warpgroups along N; 0 for mma.sync
//   SHARED_BYTES  optional: sizeof(GemmSharedStorage) as computed by the launcher, checked at compile time
// Launch
//   block       32 * (BLOCK_N / 64) * ROW_BLOCK_WARPS * WARPS_K threads
//   grid        1 .. tiles * k_tiles blocks; best is the number of resident blocks. tiles * CLUSTER blocks for CLUSTER > 1
//               tiles = ceil(N / BLOCK_N), k_tiles = ceil(ceil(K / 64) * 64 / (BLOCK_K * WARPS_K)) per output tile
//   shared      sizeof(GemmSharedStorage) bytes
//   workspace   (grid + tiles) * BLOCK_N * BLOCK_M float32, uninitialized; not used for CLUSTER > 1
//   semaphores  tiles * warps of a block, uint32: 0 before the first launch and after every launch; not used for CLUSTER > 1
//   PDL         may be launched with programmatic stream serialization
//   Concurrent launches need separate workspaces and semaphores.
#include "epilogue.cuh"
#include "gemm_pipeline.cuh"
#include "tile_scheduler.cuh"

#if CLUSTER > 1
KERNEL CLUSTER_DIMS(CLUSTER) LAUNCH_BOUNDS(kThreads, BLOCKS_PER_SM)
#else
KERNEL LAUNCH_BOUNDS(kThreads, BLOCKS_PER_SM)
#endif
void nested_gemm(const uint4* planes,  // [planes, N / 64, K / 64, 32, 4 words]; N and K rounded up to multiples of 64
                 u64 plane_stride,     // between planes, in units of 16 bytes: row_blocks * units * 32, or more for a part of a weight
                 const u16* scales,    // [groups, N / 64, 8, 4, 2]; 0 for rows beyond N and groups beyond K
                 const u8* zeros,      // same layout; read if ZEROS
#if WGMMA
                 const GRID_CONSTANT TensorMap x_map, // TMA descriptor of x [M, K], box [BLOCK_M, 64], 128-byte swizzle
#else
                 const u16* x,         // [M, K], 16-byte aligned; K is a multiple of 8
#endif
                 const u16* bias,      // [N] or null
                 u16* y,               // [M, N]
                 float4* workspace, u32* tile_semaphores,
                 int tokens, int rows, int depth, // M, N, K
                 int scale_row_blocks, // N / 64, rounded up, of the stored weight that W is a part of
                 float offset,    // offset / 2^(8 - BITS)
                 float zero_step, // zero point of a code, per unit of the stored zero point: 2^(8 - master bits) / 2^(8 - BITS)
                 float gain) {    // gain * 2^(8 - BITS)
#if WGMMA
    const TensorMap* x = &x_map;
#endif
    SHARED_MEMORY(memory);
    GemmSharedStorage& shared = *(GemmSharedStorage*)memory;
    const WarpCoord coord = warp_coord();
    GemmArgs args = {planes, plane_stride, scales, zeros, x, tokens, rows, depth, (rows + 63) / 64, scale_row_blocks, (depth + 63) / 64, 0};
    args.k_tiles = (args.units + kUnits * WARPS_K - 1) / (kUnits * WARPS_K);
    const Output out = {y, bias, tokens, rows};

    const u32 total = (u32)(args.row_blocks + kRowBlocks - 1) / kRowBlocks * args.k_tiles;
    const KTileRange range = block_range(args.k_tiles, total);
    const u32 count = range.end - range.begin;
    const u32 tile = range.begin / args.k_tiles, k_tile = range.begin % args.k_tiles;
    LoadCursor next = {nullptr, tile, k_tile, 0, shared_address(shared.ring[coord.warp_k][coord.row_block])};
    seek_tile(args, coord, next);
    prefetch_weights(args, coord, next, (int)min(count, (u32)(kNumStages - 1)));
#if CLUSTER > 1
    if (threadIdx.x == 0) expect_cluster_sums(shared, blockIdx.x % CLUSTER);
    cluster_arrive_relaxed();
#endif
    pdl_wait();
    pdl_launch_dependents();
    multiply_k_tiles(args, shared, coord, k_tile, count, next, offset, zero_step, [&](u32 done, Mainloop& mainloop) {
        mainloop.finish(gain);
#if CLUSTER > 1
        cluster_epilogue(args, out, shared, coord, tile, 0, blockIdx.x % CLUSTER, mainloop.accumulator);
#else
        epilogue(args, out, shared, coord, {tile + done, 0, tile + done, total}, workspace, tile_semaphores, mainloop.accumulator);
#endif
    });
}
