// Grouped nested GEMM of a mixture of experts: y[pair, N] = x[row of pair, K] W[expert of pair, N, K]^T with W in bit planes, of which the
// kernel reads the first BITS. A pair is a token with one of its experts. For few pairs per expert, from sm_80 on.
//
// The planes, scales and zero points of all experts of a layer are stacked: expert e holds the row blocks of 64 rows from
// first_row_block + e * expert_row_blocks on. moe_route.cu sorts the pairs by expert and cuts them into items of at most BLOCK_M pairs of
// one expert. The routing is read on the device, so that a captured CUDA graph holds for every routing. An expert without pairs has no
// item, and its weights are not read.
//
// A block computes one output tile: the pairs of one item and BLOCK_N rows, with all of K. Weight values, macros, tiling, pipeline and
// mainloop are those of gemm.cu with mma.sync. Rows of x and of y are gathered by the item's pairs. No output depends on another block.
//
// Macros      those of gemm.cu with WGMMA 0, and GATHER 1
// Launch
//   block       32 * (BLOCK_N / 64) * ROW_BLOCK_WARPS * WARPS_K threads
//   grid        x: ceil(N / BLOCK_N); y: number of entries of `items`
//   shared      sizeof(GemmSharedStorage) bytes
//   PDL         may be launched with programmatic stream serialization
//
// One launch computes the experts of one bit-width, those of `mask`; the pairs of others, and of experts that are not here, are not stored.
#include "epilogue.cuh"
#include "expert_mask.cuh"
#include "gemm_pipeline.cuh"

KERNEL LAUNCH_BOUNDS(kThreads, BLOCKS_PER_SM)
void nested_moe_gemm(const uint4* planes, u64 plane_stride, const u16* scales, const u8* zeros, // stacked; otherwise as in gemm.cu
                     const u16* x,      // [rows of x, K], 16-byte aligned; K is a multiple of 8
                     u16* y,            // [pairs, y_stride]; the kernel writes the first N columns
                     const int* pairs,  // [pairs] sorted by expert
                     const int4* items, // expert, first entry of `pairs`, number of pairs: 0 for an unused item, else up to BLOCK_M
                     const GRID_CONSTANT ExpertMask mask, // experts that this launch computes
                     int pairs_per_row, // pairs with one row of x: pair p has row p / pairs_per_row
                     int rows, int depth, // N, a multiple of 64, and K
                     int y_stride,
                     int first_row_block, int expert_row_blocks,
                     int scale_row_blocks,                        // row blocks between the scales of two groups
                     float offset, float zero_step, float gain) { // as in gemm.cu
    SHARED_MEMORY(memory);
    GemmSharedStorage& shared = *(GemmSharedStorage*)memory;
    const WarpCoord coord = warp_coord();
    pdl_wait();
    pdl_launch_dependents();
    const int4 item = items[blockIdx.y];
    const int expert = item.x, tokens = item.z;
    if (tokens == 0 || !mask.has(expert)) return; /*bug:moe-mask*/

    for (int i = threadIdx.x; i < tokens; i += kThreads) {
        const int pair = pairs[item.y + i]; /*bug:moe-item-start*/
        shared.x_rows[i] = pair / pairs_per_row; /*bug:moe-x-row*/
        shared.y_rows[i] = pair;
    }
    __syncthreads(); /*bug:moe-rows-sync*/

    const u64 row_block = first_row_block + (u64)expert * expert_row_blocks; /*bug:moe-expert*/
    const int units = (depth + 63) / 64;
    GemmArgs args = {planes + row_block * units * 32, plane_stride, scales + row_block * 64, ZEROS ? zeros + row_block * 64 : nullptr, x, tokens,
                     rows, depth, rows / 64, scale_row_blocks, units, 0, shared.x_rows};
    args.k_tiles = (units + kUnits * WARPS_K - 1) / (kUnits * WARPS_K);
    const Output out = {y, nullptr, tokens, rows, shared.y_rows, y_stride};

    LoadCursor next = {nullptr, blockIdx.x, 0, 0, shared_address(shared.ring[coord.warp_k][coord.row_block])};
    seek_tile(args, coord, next);
    multiply_k_tiles(args, shared, coord, 0, args.k_tiles, next, offset, zero_step, [&](u32, Mainloop& mainloop) {
        mainloop.finish(gain);
        epilogue(args, out, shared, coord, {blockIdx.x, 0, 0, 0}, nullptr, nullptr, mainloop.accumulator);
    });
}
