// Tile schedulers: stream-K, a range of columns for each block of a cluster, and data-parallel waves of whole output tiles before stream-K.
#pragma once
#include "gemm_config.cuh"

// Range of k-tiles of a block, among those of all output tiles.
struct KTileRange {
    u32 begin, end;
};

// k_tiles: of an output tile. total: of all output tiles that the blocks share.
DEVICE KTileRange block_range(u32 k_tiles, u32 total) {
#if CLUSTER > 1
    const u32 first = blockIdx.x / CLUSTER * k_tiles, rank = blockIdx.x % CLUSTER;
    return {first + rank * k_tiles / CLUSTER, first + (rank + 1) * k_tiles / CLUSTER};
#else
    return {blockIdx.x * total / gridDim.x, (blockIdx.x + 1) * total / gridDim.x};
#endif
}

// `k_tiles` k-tiles of an output tile, from `first_k_tile` on. Output tiles are numbered along the tokens first, so that blocks that run
// concurrently share weights in L2.
struct WorkUnit {
    u32 tile, first_k_tile, k_tiles;
};

// Work units of one block. In a data-parallel wave every block computes one whole tile; the blocks then read the same columns at the same
// time and share x and weights in L2. The k-tiles of the tiles that do not fill a wave are split into equal contiguous ranges, or with
// WHOLE_TILES are a wave of their own. In clusters there are no waves.
struct TileScheduler {
    u32 k_tiles_per_tile;
    u32 waves, tile;    // remaining data-parallel waves, and the block's tile in the next one
    u32 begin, end;     // remaining stream-K range of this block
    u32 stream_k_total; // k-tiles of all stream-K tiles

    DEVICE_MEMBER void start(u32 tiles, u32 k_tiles) {
        k_tiles_per_tile = k_tiles;
        const u32 remaining = tiles % gridDim.x;
        waves = tiles / gridDim.x + (WHOLE_TILES && blockIdx.x < remaining); /*bug:last-wave*/ // 0 in clusters
        tile = blockIdx.x;
        stream_k_total = WHOLE_TILES ? 0 : remaining * k_tiles;
        const KTileRange range = block_range(k_tiles, stream_k_total);
        begin = range.begin;
        end = range.end;
    }

    // Set the next work unit. Return false if none is left.
    DEVICE_MEMBER bool next(WorkUnit& unit) {
        if (waves) {
            unit = {tile, 0, k_tiles_per_tile};
            waves--;
            tile += gridDim.x; /*bug:wave-stride*/
            return true;
        }
        if (begin == end) return false;
        const u32 number = begin / k_tiles_per_tile, k_tile = begin - number * k_tiles_per_tile;
        unit = {first_stream_k_tile() + number, k_tile, min(k_tiles_per_tile - k_tile, end - begin)};
        begin += unit.k_tiles;
        return true;
    }

    // Valid after the last data-parallel wave.
    DEVICE_MEMBER u32 first_stream_k_tile() const { return tile - blockIdx.x; }
};
