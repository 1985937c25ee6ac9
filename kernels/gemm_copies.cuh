// The matmul's copies of weights from global to shared memory: planes and scales, into each warp's ring.
#pragma once
#include "gemm_shape.cuh"

constexpr int x_stride = x_columns + 8;      // 16 bytes more than a row: ldmatrix then meets every bank once
constexpr int x_bytes = (WGMMA ? x_columns : x_stride) * token_rows * 2; // of a chunk
constexpr int panels_ahead = (STAGES - 1 + PANEL - 1) / PANEL, x_panels = panels_ahead + 1;

// What a warp needs of the weights for one chunk.
struct Weights {
    uint4 planes[UNITS][PLANES][32];
    u16 scales[groups][8][8]; // [group][lane / 4][c][p]
#if ZEROS
    u8 zeros[groups][8][8];
#endif

    DEVICE_MEMBER const u8 (*zeros_of(int i) const)[8] {
#if ZEROS
        return zeros[i];
#else
        return nullptr;
#endif
    }
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

// Where a warp's next chunk of weights is, and where it goes. Pointers are kept and added to: computed anew for each chunk they
// would cost a fifth of all instructions.
struct Cursor {
    const uint4* planes; // this lane's 16 bytes of the first unit of plane 0
    u32 tile, chunk, stage;
    SharedAddress ring;
};

DEVICE void point_at_tile(const Problem& a, const Place& at, Cursor& next) {
    const u32 row_block = next.tile * ROW_WARPS + at.row_warp, unit = (next.chunk * K_WARPS + at.k_warp) * UNITS;
    next.planes = a.planes + ((u64)row_block * a.units + unit) * 32 + at.lane;
}

// `whole`: all units of the chunk are there, as they are but in a row's last chunk.
template <bool whole> DEVICE void copy_planes(const Problem& a, const Place& at, const Cursor& next, SharedAddress to, int units) {
    const uint4* from = next.planes;
    UNROLL
    for (int plane = 0; plane < PLANES; plane++) {
        if (plane > 0) from += a.plane_stride; /*bug:first-plane*/
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            const int i = plane * UNITS + unit;
            // What is in place of units beyond the last one meets activations of 0.
            if ((TILE_WARPS == 1 || i % TILE_WARPS == at.tile_warp) && (whole || unit < units))
                copy_async(to + (unit * PLANES + plane) * sizeof(uint4[32]) + at.lane * 16, from + unit * 32);
        }
    }
}

DEVICE void copy_scales(const Problem& a, const Place& at, SharedAddress to, int row_block, int unit) {
    if (at.tile_warp != 0) return;
    const int part = at.lane % 8;
    const SharedAddress scales = to + sizeof(uint4[UNITS][PLANES][32]);
    UNROLL
    for (int i = at.lane / 8; i < groups; i += 4) {
        const int column = unit * 64 + i * group;
        const bool inside = !GROUP || column < a.units * 64; // there is no scale beyond, and 0 * NaN is not 0
        const u32 place = inside ? (GROUP ? column / max(GROUP, 1) : 0) * a.row_blocks + row_block : 0; /*bug:scale-group*/
        copy_async(scales + i * 128 + part * 16, a.scales + (u64)place * 64 + part * 8, inside ? 16 : 0);
#if ZEROS
        if (part < 4) copy_async(scales + groups * 128 + i * 64 + part * 16, a.zeros + (u64)place * 64 + part * 16, inside ? 16 : 0);
#endif
    }
}

// Copies the chunk at the cursor, which then moves to the following one: of the tile, or of the next tile.
DEVICE void copy_weights(const Problem& a, const Place& at, Cursor& next) {
    const int row_block = (int)next.tile * ROW_WARPS + at.row_warp, unit = ((int)next.chunk * K_WARPS + at.k_warp) * UNITS;
    const SharedAddress to = next.ring + next.stage * sizeof(Weights);
    if (row_block < a.row_blocks) {
        if (unit + UNITS <= a.units) copy_planes<true>(a, at, next, to, UNITS);
        else copy_planes<false>(a, at, next, to, a.units - unit);
        copy_scales(a, at, to, row_block, unit);
    }
    next.planes += K_WARPS * UNITS * 32;
    if (++next.stage == STAGES) next.stage = 0; /*bug:ring-wrap*/
    if (++next.chunk == (u32)a.chunks) {
        next.chunk = 0;
        next.tile++;
        point_at_tile(a, at, next);
    }
}

// Brings the first chunks of this block's run, as far as they are of its first tile, on their way from memory while earlier
// kernels end. A lane takes one of the four lines of a unit.
DEVICE void prefetch_weights(const Problem& a, const Place& at, const Cursor& first, int count) {
    const int row_block = (int)first.tile * ROW_WARPS + at.row_warp;
    if (row_block >= a.row_blocks) return;
    for (int i = at.lane / 4; i < count * UNITS; i += 8) {
        const int unit = (((int)first.chunk + i / UNITS) * K_WARPS + at.k_warp) * UNITS + i % UNITS;
        if (unit >= a.units) return;
        const uint4* line = a.planes + ((u64)row_block * a.units + unit) * 32 + at.lane % 4 * 8;
        UNROLL
        for (int plane = 0; plane < PLANES; plane++)
            if (TILE_WARPS == 1 || plane % TILE_WARPS == at.tile_warp) prefetch(line + plane * a.plane_stride);
        const int group = GROUP ? unit * 64 / max(GROUP, 1) : 0;
        if (at.tile_warp == 0) prefetch(a.scales + ((u64)group * a.row_blocks + row_block) * 64);
    }
}
