// What the parts of the matmul share: its macros as numbers, its shared memory, the problem, and a warp's place.
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
constexpr int x_stride = x_columns + 8;      // 16 bytes more than a row: ldmatrix then meets every bank once
constexpr int x_bytes = (WGMMA ? x_columns : x_stride) * token_rows * 2; // of a chunk
constexpr int steps_of_group = group / 16;
constexpr int panels_ahead = (STAGES - 1 + PANEL - 1) / PANEL, x_panels = panels_ahead + 1;

// What a warp needs of the weights for one chunk.
struct Weights {
    uint4 planes[UNITS][PLANES][32];
    u16 scales[groups][8][8]; // [group][lane / 4][c][p]
#if ZEROS
    u8 zeros[groups][8][8];
#endif
};

struct Shared {
    // Activations: the panel in work and those that are on their way. At the start, where 1024 bytes begin.
    alignas(16) u8 x[x_panels][PANEL][x_bytes];
    Weights ring[K_WARPS][ROW_WARPS][STAGES];
#if K_WARPS > 1
    float4 sums[K_WARPS][ROW_WARPS * TILE_WARPS][row_tiles_of_warp * TOKEN_TILES][32];
#endif
#if WGMMA
    u64 arrived[x_panels]; // barriers
#else
    float x_sums[PANEL][K_WARPS][groups][token_rows];
#endif
};

#ifdef SHARED_BYTES
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher computes the size as well");
#endif

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
    int token_tiles;            // of token_rows tokens; 1 without wgmma
};

// Tiles of y are counted along the tokens first: blocks that work at the same time then share weights in the second-level cache.
DEVICE u32 row_tile_of(const Problem& a, u32 tile) { return WGMMA ? tile / a.token_tiles : tile; }
DEVICE u32 token_tile_of(const Problem& a, u32 tile) { return WGMMA ? tile % a.token_tiles : 0; }

// Which of the block's warps this is.
struct Place {
    int lane, row_warp, tile_warp, k_warp;
};

