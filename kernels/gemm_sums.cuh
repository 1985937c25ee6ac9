// How the matmul's sums leave it: added up over the warps of a block and over the blocks of a tile, and written to y.
#pragma once
#include "gemm_shape.cuh"

DEVICE u16 to_output(float f) { return BFLOAT ? float_to_bfloat(f) : float_to_half(f); }
DEVICE float from_bias(u16 bits) { return BFLOAT ? bfloat_to_float(bits) : half_to_float(bits); }

struct Output {
    u16* y;
    const u16* bias;
    int tokens, rows;
};

// Rows from `row` on and tokens from `token` on: one accumulator of the warp.
DEVICE void write_output(const Output& out, int row, int token, int lane, const float4& sum) {
    UNROLL
    for (int p = 0; p < 2; p++) {
        const int n = row + lane / 4 + 8 * p, m = token + 2 * (lane % 4);
        if (n >= out.rows) continue; /*bug:row-bounds*/
        const float bias = out.bias ? from_bias(out.bias[n]) : 0.0f;
        if (m < out.tokens) out.y[(u64)m * out.rows + n] = to_output((p ? sum.z : sum.x) + bias);
        if (m + 1 < out.tokens) out.y[(u64)(m + 1) * out.rows + n] = to_output((p ? sum.w : sum.y) + bias);
    }
}

// Which block works on a chunk, of `all` that are dealt out as in the kernel below.
DEVICE u32 block_of(u32 chunk, u32 all) { return ((chunk + 1) * gridDim.x - 1) / all; }

// What the warps of one block that share rows have summed, added up: each of the K_WARPS gets accumulators
// k_warp, k_warp + K_WARPS, ..., as sums[0], sums[1], ...
constexpr int shares = (accumulators + K_WARPS - 1) / K_WARPS;

template <class Shared> DEVICE void share_sums(Shared& shared, const Place& at, const float (&total)[accumulators][4], float4 (&sums)[shares]) {
#if K_WARPS == 1
    UNROLL
    for (int j = 0; j < accumulators; j++) sums[j] = make_float4(total[j][0], total[j][1], total[j][2], total[j][3]);
#else
    const int rows = at.row_warp * TILE_WARPS + at.tile_warp;
    __syncthreads(); /*bug:k-warps-read*/ // nobody reads the sums of the tile before any more
    UNROLL
    for (int j = 0; j < accumulators; j++)
        shared.sums[at.k_warp][rows][j][at.lane] = make_float4(total[j][0], total[j][1], total[j][2], total[j][3]);
    __syncthreads(); /*bug:k-warps-written*/
    UNROLL
    for (int i = 0; i < shares; i++) {
        const int j = at.k_warp + i * K_WARPS;
        sums[i] = make_float4(0, 0, 0, 0);
        if (j >= accumulators) continue;
        UNROLL
        for (int k = 0; k < K_WARPS; k++) {
            const float4 v = shared.sums[k][rows][j][at.lane];
            sums[i] = make_float4(sums[i].x + v.x, sums[i].y + v.y, sums[i].z + v.z, sums[i].w + v.w);
        }
    }
#endif
}

// Adds up what the blocks first .. last have left of this warp's sums. A block's place in the workspace is its own number
// plus the tile's: unique, since from one piece of work to the next at least one of the two grows.
DEVICE void leave_sums(float4* workspace, u32 block, u32 tile, const Place& at, const float4 (&sums)[shares]) {
    float4* place = workspace + ((u64)(block + tile) * ROW_WARPS * TILE_WARPS + at.row_warp * TILE_WARPS + at.tile_warp) * accumulators * 32;
    UNROLL
    for (int i = 0; i < shares; i++)
        if (at.k_warp + i * K_WARPS < accumulators) store_for_other_blocks(place + (at.k_warp + i * K_WARPS) * 32 + at.lane, sums[i]);
}

DEVICE void collect_sums(const float4* workspace, u32 first, u32 last, u32 tile, const Place& at, float4 (&sums)[shares]) {
    UNROLL
    for (int i = 0; i < shares; i++) sums[i] = make_float4(0, 0, 0, 0);
    constexpr int together = shares > 16 ? 1 : shares > 8 ? 2 : 4; // as many as registers allow
    _Pragma("unroll together")
    for (u32 block = first; block <= last; block++) {
        const float4* place = workspace + ((u64)(block + tile) * ROW_WARPS * TILE_WARPS + at.row_warp * TILE_WARPS + at.tile_warp) * accumulators * 32;
        UNROLL
        for (int i = 0; i < shares; i++) {
            if (at.k_warp + i * K_WARPS >= accumulators) continue;
            const float4 v = load_from_other_blocks(place + (at.k_warp + i * K_WARPS) * 32 + at.lane);
            sums[i] = make_float4(sums[i].x + v.x, sums[i].y + v.y, sums[i].z + v.z, sums[i].w + v.w);
        }
    }
}

// True for the last of `count` warps that leave sums for the same outputs; those of the others are then to be seen.
DEVICE bool is_last(u32* ticket, u32 count, int lane) {
    device_fence(); /*bug:release-fence*/ // by each lane, after its stores
    __syncwarp();
    u32 earlier = 0;
    if (lane == 0) earlier = atomicAdd(ticket, 1u);
    earlier = __shfl_sync(~0u, earlier, 0);
    if (earlier != count - 1) return false; /*bug:last-arrival*/
    if (lane == 0) *ticket = 0; /*bug:semaphore-reset*/
    device_fence(); /*bug:acquire-fence*/
    return true;
}

// What this block has summed of a tile goes to y, or to the workspace if other blocks work on the tile too.
// row_tile, token_tile: its place in y. number: of the tile among those whose chunks, `all` together, are dealt out to the blocks in
// runs; all is 0 if the block has the tile to itself.
template <class Shared, class Sums>
DEVICE void finish_tile(const Problem& a, const Output& out, Shared& shared, const Place& at, u32 row_tile, u32 token_tile, u32 number, u32 all,
                        float gain, float4* workspace, u32* tickets, Sums& of_warp) {
    of_warp.finish(gain);
    float4 sums[shares];
    share_sums(shared, at, of_warp.total, sums);
    const int row_block = (int)row_tile * ROW_WARPS + at.row_warp;
    if (row_block >= a.row_blocks || at.k_warp >= accumulators) return;
    const u32 first = all ? block_of(number * a.chunks, all) : 0, last = all ? block_of((number + 1) * a.chunks - 1, all) : 0;
    if (first != last) {
        leave_sums(workspace, blockIdx.x, number, at, sums);
        if (!is_last(tickets + number * warps + threadIdx.x / 32, last - first + 1, at.lane)) return;
        collect_sums(workspace, first, last, number, at, sums);
    }
    const int first_token = (int)opaque(token_tile) * token_rows;
    UNROLL
    for (int i = 0; i < shares; i++) {
        // Rows first: what is the same for a token takes registers.
        const int share = K_WARPS > 1 ? i : i % row_tiles_of_warp * TOKEN_TILES + i / row_tiles_of_warp, j = at.k_warp + share * K_WARPS;
        if (j >= accumulators) continue;
        const int row = row_block * 64 + (at.tile_warp * row_tiles_of_warp + j / TOKEN_TILES) * 16;
        write_output(out, row, first_token + j % TOKEN_TILES * 8, at.lane, sums[share]);
    }
}
