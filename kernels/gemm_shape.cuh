// What the parts of the matmul share: its macros as numbers, the problem, and a warp's place.
#pragma once
#include "fragments.cuh"
#include "hopper.cuh"

#define PLANES (BITS + (ROUND && BITS < 8))

constexpr int warps = ROW_WARPS * TILE_WARPS * K_WARPS, threads = 32 * warps;
constexpr int row_tiles_of_warp = 4 / TILE_WARPS; // tiles of 16 rows
constexpr int columns = 64 * UNITS;               // of a chunk, for one of the K_WARPS
constexpr int group = GROUP && GROUP < columns ? GROUP : columns; // columns after which sums are scaled
constexpr int groups = columns / group;
constexpr int token_rows = 8 * TOKEN_TILES;
constexpr int x_columns = columns * K_WARPS; // of a chunk
constexpr int steps_of_group = group / 16;

typedef Fragments<BITS, BFLOAT> Fragment;
constexpr int accumulators = row_tiles_of_warp * TOKEN_TILES; // of 16 rows and 8 tokens, 4 floats a lane

#if WGMMA
typedef TensorMap Activations;
#else
typedef u16 Activations;
#endif

struct Problem {
    const uint4* planes;
    u64 plane_stride;
    const u16* scales;
    const u8* zeros;
    const Activations* x;
    int tokens, rows, depth;    // M, N, K
    int row_blocks, units;      // of 64 rows, of 64 columns
    int chunks;                 // of a tile
};

// Which of the block's warps this is.
struct Place {
    int lane, row_warp, tile_warp, k_warp;
};

