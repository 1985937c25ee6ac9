// Epilogue: reduction of partial sums over the warps along K and over the blocks of an output tile, and the store to y. The blocks
// exchange partial sums through global memory (stream-K), or through the shared memory of a cluster.
#pragma once
#include "accumulator.cuh"

// Fewer tokens have few elements to store, and transposing them takes longer.
constexpr bool kStoresFours = kBlockM > 16;

DEVICE u16 float_to_output(float f) { return BFLOAT ? float_to_bfloat(f) : float_to_half(f); }
DEVICE u32 floats_to_output2(float low, float high) { return BFLOAT ? floats_to_bfloat2(low, high) : floats_to_half2(low, high); }
DEVICE float bias_to_float(u16 bits) { return BFLOAT ? bfloat_to_float(bits) : half_to_float(bits); }

struct Output {
    u16* y;
    const u16* bias;
    int tokens, rows;
    const int* y_rows; // row of y of each token, and elements between two rows; used if GATHER
    int y_stride;

    DEVICE_MEMBER u16* row(int token) const { return y + (GATHER ? (u64)y_rows[token] * y_stride : (u64)token * rows); }

    // 1 if four rows of W can be stored at once.
    DEVICE_MEMBER bool holds_aligned_fours() const { return !(rows % 4 | (GATHER ? y_stride % 4 : 0) | (int)((u64)y % 8)); }
};

// Coordinates of an output tile in y, and its place in the stream-K schedule.
struct OutputTile {
    u32 row_tile, token_tile;
    u32 stream_k_tile;  // index among the tiles that stream-K distributes
    u32 stream_k_total; // k-tiles of all these tiles; 0 if one block computes the whole tile
};

// Store one 16x8 accumulator at (row, token), element by element.
DEVICE void store_elements(const Output& out, int row, int token, int lane, const float4& sum) {
    UNROLL
    for (int p = 0; p < 2; p++) {
        const int n = row + lane / 4 + 8 * p, m = token + 2 * (lane % 4);
        if (n >= out.rows) continue; /*bug:row-bounds*/
        const float bias = out.bias ? bias_to_float(out.bias[n]) : 0.0f;
        if (m < out.tokens) out.row(m)[n] = float_to_output((p ? sum.z : sum.x) + bias);
        if (m + 1 < out.tokens) out.row(m + 1)[n] = float_to_output((p ? sum.w : sum.y) + bias);
    }
}

// Store one 16x8 accumulator at (row, token), four rows of one token per lane, so that the lanes of a token store 32 contiguous bytes.
DEVICE void store_fours(const Output& out, int row, int token, int lane, const float4& sum) {
    const int n = row + lane / 4;
    const float bias = out.bias && n < out.rows ? bias_to_float(out.bias[n]) : 0.0f;
    const float next = out.bias && n + 8 < out.rows ? bias_to_float(out.bias[n + 8]) : 0.0f;
    // Rows 0 to 7 and 8 to 15; lane 4i + j has rows 2j and 2j + 1 of token i.
    const u32 low = transpose_8x8(floats_to_output2(sum.x + bias, sum.y + bias));
    const u32 high = transpose_8x8(floats_to_output2(sum.z + next, sum.w + next));
    const bool odd = lane % 2;
    const u32 received = __shfl_xor_sync(~0u, odd ? low : high, 1); // even lanes keep rows below 8, odd lanes the others
    const int first = row + (odd ? 8 : 0) + lane % 4 / 2 * 4, m = token + lane / 4;
    if (m < out.tokens && first < out.rows) *(uint2*)(out.row(m) + first) = {odd ? received : low, odd ? high : received}; /*bug:store-fours*/
}

// Store one 16x8 accumulator at (row, token).
DEVICE void store_output(const Output& out, int row, int token, int lane, const float4& sum) {
    if (kStoresFours && out.holds_aligned_fours()) store_fours(out, row, token, lane, sum);
    else store_elements(out, row, token, lane, sum);
}

DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Block that computes a k-tile, of `total` that stream-K distributes in equal contiguous ranges.
DEVICE u32 stream_k_block(u32 k_tile, u32 total) { return ((k_tile + 1) * gridDim.x - 1) / total; }

// Accumulators that each warp along K finalizes: sums[i] is accumulator warp_k + i * WARPS_K.
constexpr int kShares = (kAccumulators + WARPS_K - 1) / WARPS_K;

DEVICE float4 accumulator_sum(const Accumulator& accumulator, int j) {
    const float(&value)[4] = accumulator.value[j];
    return make_float4(value[0], value[1], value[2], value[3]);
}

// Store a warp's accumulators to its block's partial sums.
template <class Shared> DEVICE void share_accumulators(Shared& shared, const WarpCoord& coord, const Accumulator& accumulator) {
    UNROLL
    for (int j = 0; j < kAccumulators; j++)
        shared.partial_sums[coord.warp_k][coord.warp_n()][j][coord.lane] = accumulator_sum(accumulator, j);
}

// Reduce the accumulators of the warps along K through shared memory.
template <class Shared>
DEVICE void reduce_warps_k(Shared& shared, const WarpCoord& coord, const Accumulator& accumulator, float4 (&sums)[kShares]) {
#if WARPS_K == 1
    UNROLL
    for (int j = 0; j < kAccumulators; j++) sums[j] = accumulator_sum(accumulator, j);
#else
    __syncthreads(); /*bug:k-warps-read*/ // all reads of the previous tile's partial sums are complete
    share_accumulators(shared, coord, accumulator);
    __syncthreads(); /*bug:k-warps-written*/
    UNROLL
    for (int i = 0; i < kShares; i++) {
        const int j = coord.warp_k + i * WARPS_K;
        sums[i] = make_float4(0, 0, 0, 0);
        if (j >= kAccumulators) continue;
        UNROLL
        for (int k = 0; k < WARPS_K; k++) sums[i] = add(sums[i], shared.partial_sums[k][coord.warp_n()][j][coord.lane]);
    }
#endif
}

// Address in the workspace of one block's partial sums of one tile, for this warp along N. block + tile is unique: from one work unit to
// the next at least one of them increases, and none decreases.
template <class Pointer> DEVICE Pointer partial_tile(Pointer workspace, u32 block, u32 tile, const WarpCoord& coord) {
    return workspace + ((u64)(block + tile) * kRowBlocks * ROW_BLOCK_WARPS + coord.row_block * ROW_BLOCK_WARPS + coord.warp_in_row_block) * kAccumulators * 32;
}

DEVICE void store_partial(float4* workspace, u32 block, u32 tile, const WarpCoord& coord, const float4 (&sums)[kShares]) {
    float4* partial = partial_tile(workspace, block, tile, coord);
    UNROLL
    for (int i = 0; i < kShares; i++)
        if (coord.warp_k + i * WARPS_K < kAccumulators) store_cg(partial + (coord.warp_k + i * WARPS_K) * 32 + coord.lane, sums[i]);
}

// Sum the partial sums of blocks first .. last in this order, so that the result is deterministic.
DEVICE void reduce_partials(const float4* workspace, u32 first, u32 last, u32 tile, const WarpCoord& coord, float4 (&sums)[kShares]) {
    UNROLL
    for (int i = 0; i < kShares; i++) sums[i] = make_float4(0, 0, 0, 0);
    constexpr int kUnroll = kShares > 16 ? 1 : kShares > 8 ? 2 : 4; // limited by registers
    _Pragma("unroll kUnroll")
    for (u32 block = first; block <= last; block++) {
        const float4* partial = partial_tile(workspace, block, tile, coord);
        UNROLL
        for (int i = 0; i < kShares; i++) {
            if (coord.warp_k + i * WARPS_K >= kAccumulators) continue;
            sums[i] = add(sums[i], load_cg(partial + (coord.warp_k + i * WARPS_K) * 32 + coord.lane));
        }
    }
}

// Arrive at the semaphore of a warp's share of a tile. Return true in the last of `count` arriving warps, which resets the semaphore
// and may then load the partial sums of all of them.
DEVICE bool arrive_last(u32* semaphore, u32 count, int lane) {
    fence_acq_rel_gpu(); /*bug:release-fence*/ // by every lane, after its stores
    __syncwarp();
    u32 earlier = 0;
    if (lane == 0) earlier = atomicAdd(semaphore, 1u);
    earlier = __shfl_sync(~0u, earlier, 0);
    if (earlier != count - 1) return false; /*bug:last-arrival*/
    if (lane == 0) *semaphore = 0; /*bug:semaphore-reset*/
    fence_acq_rel_gpu(); /*bug:acquire-fence*/
    return true;
}

// Store this block's accumulators of a tile to y. If stream-K splits the tile, store partial sums instead; the last warp to arrive at the
// tile's semaphore reduces them. accumulator: in units of y.
template <class Shared>
DEVICE void epilogue(const GemmArgs& args, const Output& out, Shared& shared, const WarpCoord& coord, const OutputTile& tile, float4* workspace,
                     u32* tile_semaphores, const Accumulator& accumulator) {
    float4 sums[kShares];
    reduce_warps_k(shared, coord, accumulator, sums);
    const int row_block = (int)tile.row_tile * kRowBlocks + coord.row_block;
    if (row_block >= args.row_blocks || coord.warp_k >= kAccumulators) return;
    const u32 number = tile.stream_k_tile, total = tile.stream_k_total;
    const u32 first = total ? stream_k_block(number * args.k_tiles, total) : 0;
    const u32 last = total ? stream_k_block((number + 1) * args.k_tiles - 1, total) : 0;
    if (first != last) {
        store_partial(workspace, blockIdx.x, number, coord, sums);
        if (!arrive_last(tile_semaphores + number * kWarps + threadIdx.x / 32, last - first + 1, coord.lane)) return;
        reduce_partials(workspace, first, last, number, coord, sums);
    }
    const int first_token = (int)opaque(tile.token_tile) * kBlockM;
    UNROLL
    for (int i = 0; i < kShares; i++) {
        // Rows vary fastest: values that are constant per token occupy registers.
        const int share = WARPS_K > 1 ? i : i % kRowTiles * kTokenTiles + i / kRowTiles, j = coord.warp_k + share * WARPS_K;
        if (j >= kAccumulators) continue;
        const int row = row_block * 64 + (coord.warp_in_row_block * kRowTiles + j / kTokenTiles) * 16;
        store_output(out, row, first_token + j % kTokenTiles * 8, coord.lane, sums[share]);
    }
}

#if CLUSTER > 1
// Expect the partial sums that block `rank` adds up, at the block's own mbarrier. By one thread, before the cluster's barrier.
template <class Shared> DEVICE void expect_cluster_sums(Shared& shared, u32 rank) {
    const SharedAddress barrier = shared_address(&shared.cluster_barrier);
    const u32 accumulators = (kAccumulators + CLUSTER - 1 - rank) / CLUSTER; // of a warp
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect_tx(barrier, CLUSTER * kWarpsN * accumulators * sizeof(float4[32])); /*bug:cluster-bytes*/
}

// Store an output tile that the blocks of a cluster share, each with a part of the columns. Block `rank` adds up every CLUSTER-th
// accumulator in the order of the blocks, so that the result is deterministic. The cluster has arrived at its barrier once before.
template <class Shared>
DEVICE void cluster_epilogue(const GemmArgs& args, const Output& out, Shared& shared, const WarpCoord& coord, u32 row_tile, int first_token,
                             u32 rank, const Accumulator& accumulator) {
    float4 sums[kShares];
    reduce_warps_k(shared, coord, accumulator, sums);
    cluster_wait(); /*bug:cluster-begun*/ // all blocks expect partial sums
    const SharedAddress barrier = shared_address(&shared.cluster_barrier);
    UNROLL
    for (int i = 0; i < kShares; i++) {
        const int j = coord.warp_k + i * WARPS_K;
        if (j >= kAccumulators) continue;
        const SharedAddress to = shared_address(&shared.cluster_sums[rank][coord.warp_n()][j / CLUSTER][coord.lane]);
        store_cluster_async(to, barrier, j % CLUSTER, sums[i]); /*bug:cluster-rank*/
    }
    mbarrier_wait_cluster(barrier, 0); /*bug:cluster-written*/
    const int row_block = (int)row_tile * kRowBlocks + coord.row_block;
    UNROLL
    for (int i = 0; i * WARPS_K < kClusterShares; i++) {
        const int share = coord.warp_k + i * WARPS_K, j = share * CLUSTER + (int)rank;
        if (share >= kClusterShares || j >= kAccumulators || row_block >= args.row_blocks) continue;
        float4 sum = make_float4(0, 0, 0, 0);
        UNROLL
        for (int block = 0; block < CLUSTER; block++) sum = add(sum, shared.cluster_sums[block][coord.warp_n()][share][coord.lane]);
        const int row = row_block * 64 + (coord.warp_in_row_block * kRowTiles + j / kTokenTiles) * 16;
        store_output(out, row, first_token + j % kTokenTiles * 8, coord.lane, sum);
    }
}
#endif
