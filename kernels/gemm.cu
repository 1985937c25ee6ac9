// y[M, N] = x[M, K] W^T + bias, for W in bit planes, of which it reads the first BITS. M <= 8 * TOKEN_TILES; for more on sm_90a see
// gemm_sm90_ws.cu.
//
// The value of a weight is   gain * s * (2^(8 - BITS) * code + offset - zero)   with s and zero of its group; `code` is the
// slice of BITS bits of an 8-bit code (codes of fewer bits are an 8-bit code's first planes; `gain` and `offset` are scaled).
//
// Work. A block is ROW_WARPS x TILE_WARPS x K_WARPS warps and works on tiles of 64 * ROW_WARPS rows, a
// chunk of 64 * UNITS * K_WARPS columns at a time: each of the K_WARPS takes its own 64 * UNITS columns, each of the TILE_WARPS
// its own 64 / TILE_WARPS rows of 64. All chunks of all tiles in a row, tile by tile, are dealt out to the blocks in equal runs, so
// a run may end or begin within a tile. Where several blocks have worked on a tile, each leaves its sums in the workspace, and
// the warp that comes last adds them up, always in the same order, and sets its ticket back to 0.
//
// Planes, scales and zero points are copied to shared memory STAGES - 1 chunks before they are used, into a ring that belongs
// to one warp (to the TILE_WARPS that share rows), so that warps do not wait for each other. Activations belong to the whole
// block; they come PANEL chunks at a time, as far ahead as the weights, and the block meets only where a panel begins.
//
// By mma.sync (gemm_mma.cuh) weights stay integers in the tensor cores (see fragments.cuh). With t = sum of x * fragment and X = sum of x over a
// group, its part of y is  s * unit^-1 * 2^(8 - BITS) * (t + X * (unit * (offset - zero) / 2^(8 - BITS) - bias));  X is
// computed once per block, by a product with ones. By wgmma, see gemm_wgmma.cuh.
//
// Macros
//   BITS 2..8, ROUND 0 or 1 (slices are rounded, one plane more is read), GROUP 32, 64, 128 or 0 (a scale per row),
//   ZEROS 0 or 1, BFLOAT 0 or 1 (x, bias and y), SCALE_BFLOAT 0 or 1, TOKEN_TILES 1, 2, 4, 8,
//   ROW_WARPS, K_WARPS, TILE_WARPS (1, 2, 4), UNITS (1, 2, 4), STAGES >= 2, PANEL >= 1, BLOCKS_PER_SM,
//   WGMMA 0, or 1 on sm_90a: then TOKEN_TILES is 2, 4 or 8, and ROW_WARPS * TILE_WARPS a multiple of 4
// Launch
//   block   32 * ROW_WARPS * TILE_WARPS * K_WARPS threads
//   grid    any number of blocks up to tiles * chunks; as many as are resident at once is best
//           tiles = ceil(N / (64 * ROW_WARPS)), chunks = ceil(ceil(K / 64) / (UNITS * K_WARPS))
//   shared  sizeof(Shared); a launcher that computes it can have it checked with -DSHARED_BYTES
//   workspace  (grid + tiles) * 64 * ROW_WARPS * 8 * TOKEN_TILES float32, never initialised
//   tickets    tiles * warps of a block, uint32, 0 before the first launch and after every launch
//   A workspace and its tickets serve one launch at a time.
#include "gemm_copies.cuh"
#include "gemm_groups.cuh"
#include "gemm_sums.cuh"
#if WGMMA
#include "gemm_wgmma.cuh"
#else
#include "gemm_mma.cuh"
#endif

// The warps that share a ring meet.
DEVICE void meet(const Place& at) {
    if (TILE_WARPS == 1) __syncwarp();
    else named_barrier(1 + at.k_warp * ROW_WARPS + at.row_warp, 32 * TILE_WARPS);
}

KERNEL LAUNCH_BOUNDS(32 * ROW_WARPS * TILE_WARPS * K_WARPS, BLOCKS_PER_SM)
void nested_gemm(const uint4* planes,  // [planes, N / 64, K / 64, 32, 4 words], N and K rounded up
                 u64 plane_stride,     // from plane to plane in 16 bytes: row_blocks * units * 32
                 const u16* scales,    // [groups, N / 64, 8, 4, 2]; 0 for rows and groups that are not there
                 const u8* zeros,      // likewise; read if ZEROS
#if WGMMA
                 const GRID_CONSTANT TensorMap x_map, // of x, in tiles of 8 * TOKEN_TILES tokens and 64 columns
#else
                 const u16* x,         // [M, K], 16-byte aligned, K a multiple of 8
#endif
                 const u16* bias,      // [N] or null
                 u16* y,               // [M, N]
                 float4* workspace, u32* tickets, int tokens, int rows, int depth,
                 float offset,    // offset / 2^(8 - BITS)
                 float zero_step, // of a zero point: 2^(8 - master bits) / 2^(8 - BITS)
                 float gain) {    // gain * 2^(8 - BITS)
#if WGMMA
    const TensorMap* x = &x_map;
#endif
    SHARED_MEMORY(memory);
    Shared& shared = *(Shared*)memory;
    const int warp = threadIdx.x / 32;
    const Place at = {(int)threadIdx.x % 32, warp % ROW_WARPS, warp / ROW_WARPS % TILE_WARPS, K_WARPS > 1 ? warp / (ROW_WARPS * TILE_WARPS) : 0};
    Problem a = {planes, plane_stride, scales, zeros, x, tokens, rows, depth, (rows + 63) / 64, (depth + 63) / 64, 0};
    a.chunks = (a.units + UNITS * K_WARPS - 1) / (UNITS * K_WARPS);
    const Output out = {y, bias, tokens, rows};

    // This block's run of chunks, begin .. end - 1 of all tiles' chunks in a row.
    const u32 all = (u32)(a.row_blocks + ROW_WARPS - 1) / ROW_WARPS * a.chunks;
    const u32 begin = blockIdx.x * all / gridDim.x, end = (blockIdx.x + 1) * all / gridDim.x;
    const u32 count = end - begin;
    u32 tile = begin / a.chunks, chunk = begin % a.chunks;
    const Weights(&ring)[STAGES] = shared.ring[at.k_warp][at.row_warp];
    Cursor next = {nullptr, tile, chunk, 0, shared_address(ring)};
    point_at_tile(a, at, next);
    prefetch_weights(a, at, next, (int)min(count, (u32)(STAGES - 1)));
    wait_for_earlier_kernels();
    let_next_kernel_begin();
    Panels panels;
    panels.start(a, shared, chunk, count);
    copy_async_commit();
    _Pragma("unroll 1") for (u32 i = 0; i < STAGES - 1; i++) {
        if (i < count) copy_weights(a, at, next);
        copy_async_commit(); // an empty group at the end, so that counting groups stays right
    }

    Sums sums;
    sums.clear();
    u32 stage = 0, slot = 0;
    for (u32 i = 0; i < count; i++) {
        copy_async_wait<STAGES - 2>(); /*bug:ring-wait*/ // this thread's copies of this chunk's weights and of its panel
        if (slot == 0) panels.enter(a, shared, at.lane, warp, chunk, count - i);
        meet(at); /*bug:ring-sync*/ // this chunk's weights are there, and the last one's are done with
        if (i + STAGES - 1 < count) copy_weights(a, at, next);
        copy_async_commit();
        sums.add_chunk(ring[stage], shared, panels.now, slot, at, offset, zero_step);
        if (++stage == STAGES) stage = 0;
        if (++slot == PANEL) {
            slot = 0;
            panels.leave(shared);
        }
        if (++chunk == (u32)a.chunks || i + 1 == count) {
            finish_tile(a, out, shared, at, tile, 0, tile, all, gain, workspace, tickets, sums);
            sums.clear(); /*bug:clear-accumulator*/
            chunk = 0;
            tile++;
        }
    }
    copy_async_wait<0>(); /*bug:final-wait*/
}
