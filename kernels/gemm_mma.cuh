// The products of a chunk by mma.sync, each warp on its own: codes are multiplied as they are, and what a group gives is
// scaled and added up in other registers.
#pragma once
#include "gemm_groups.cuh"

// Where a chunk has a token and a column, a multiple of 8. A sum of offsets is the offset of the sums.
DEVICE constexpr int x_offset(int token, int column) { return (token * x_stride + column) * 2; }

// The activations of `count` chunks from `chunk` on; after a tile's last chunk comes the next tile's first one. More than a panel
// of them only before the first.
DEVICE void copy_x(const Problem& a, SharedAddress to, int chunk, int count) {
    constexpr int pieces = x_columns / 8;
    for (int i = threadIdx.x; i < token_rows * count * pieces; i += threads) {
        const int token = i / pieces % token_rows, slot = i / pieces / token_rows, column = i % pieces * 8;
        if (token >= a.tokens) continue; // such a row only reaches rows of y that nobody keeps
        int from_chunk = chunk + slot;
        while (from_chunk >= a.chunks) from_chunk -= a.chunks;
        const int from = from_chunk * x_columns + column;
        const bool inside = from < a.depth; /*bug:x-bounds*/
        copy_async(to + slot * x_bytes + x_offset(token, column), a.x + (inside ? (u64)token * a.depth + from : 0), inside ? 16 : 0);
    }
}

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    if (BFLOAT) mma_bfloat(d, a, b0, b1, c);
    else mma_half(d, a, b0, b1, c);
}

// Activations of 32 columns, for one tile of 8 tokens.
DEVICE void load_two_steps(SharedAddress x, int lane, u32 (&b)[4]) { load_matrices(b, x + x_offset(lane % 8, lane / 8 * 8)); }

// Sums of x over each group, for `count` chunks and all tokens: the warps share them out.
DEVICE void sum_x(SharedAddress x, float (&sums)[PANEL][K_WARPS][groups][token_rows], int count, int lane, int warp) {
    const u32 one = BFLOAT ? 0x3F803F80u : 0x3C003C00u, ones[4] = {one, one, one, one};
    for (int task = warp; task < count * K_WARPS * groups * TOKEN_TILES; task += warps) {
        const int tile = task % TOKEN_TILES, i = task / TOKEN_TILES % groups;
        const int k_warp = task / (TOKEN_TILES * groups) % K_WARPS, slot = task / (TOKEN_TILES * groups * K_WARPS);
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        UNROLL
        for (int step = 0; step < steps_of_group; step += 2) {
            u32 b[4];
            load_two_steps(x + slot * x_bytes + x_offset(tile * 8, k_warp * columns + i * group + step * 16), lane, b);
            multiply(even, ones, b[0], b[1], even);
            multiply(odd, ones, b[2], b[3], odd);
        }
        if (lane < 4) *(float2*)&sums[slot][k_warp][i][tile * 8 + 2 * lane] = make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
}

// Activations of 16 columns, as B fragments of two tiles of 8 tokens. x: of the first of them.
DEVICE void load_two_tiles(SharedAddress x, int lane, u32 (&b)[4]) {
    load_matrices(b, x + x_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
}

// The activations' way through shared memory. All threads call its functions together.
struct Panels {
    SharedAddress now, before; // the panel in work, and the one that comes in as soon as nobody needs it any more

    DEVICE_MEMBER void start(const Problem& a, Shared& shared, u32 chunk, u32 count) {
        now = shared_address(shared.x);
        before = now + panels_ahead * sizeof(shared.x[0]);
        copy_x(a, now, chunk, min(count, (u32)(panels_ahead * PANEL)));
    }

    // Where a panel begins, of which this thread's copies have arrived. left: chunks from its first one on.
    DEVICE_MEMBER void enter(const Problem& a, Shared& shared, int lane, int warp, u32 chunk, u32 left) {
        constexpr u32 ahead = panels_ahead * PANEL;
        __syncthreads(); /*bug:x-stage-full-sync*/ // all threads' copies of the panel are there, and nobody needs the one before it any more
        if (ahead < left) copy_x(a, before, chunk + ahead, min(left - ahead, (u32)PANEL));
        sum_x(now, shared.x_sums, min(left, (u32)PANEL), lane, warp);
        __syncthreads(); /*bug:x-sums-sync*/
    }

    DEVICE_MEMBER void leave(Shared& shared) {
        const SharedAddress first = shared_address(shared.x);
        before = now;
        now = now == first + panels_ahead * sizeof(shared.x[0]) ? first : now + sizeof(shared.x[0]);
    }
};

// What a warp has summed of a tile.
struct Sums {
    float total[accumulators][4];

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
    }

    // panel: of activations, in which the chunk is number `slot`.
    DEVICE_MEMBER void add_chunk(const Weights& weights, Shared& shared, SharedAddress panel, u32 slot, const Place& at, float offset,
                                 float zero_step) {
        const SharedAddress x = panel + slot * x_bytes + x_offset(0, at.k_warp * columns);
        const float(&x_sums)[groups][token_rows] = shared.x_sums[slot][at.k_warp];
        float product[accumulators][4];
        u32 b[4];
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 words[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) words[d] = weights.planes[unit][d][at.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                u32 fragment[Fragment::parts][row_tiles_of_warp][4];
                decode_step(words, r, at, fragment);
                multiply_step(x + x_offset(0, step * 16), at.lane, step % steps_of_group == 0, r % 2 == 0, fragment, b, product);
                if (step % steps_of_group == steps_of_group - 1) {
                    const int i = step / steps_of_group;
                    scale_group(load_group(weights.scales[i], weights.zeros_of(i), at, offset, zero_step), x_sums[i], at.lane, product);
                }
            }
        }
    }

    // Every sum times `gain` and in units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < accumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) total[j][e] *= gain / Fragment::unit(j / TOKEN_TILES, e >> 1);
    }

  private:
    // The products of one step of 16 columns with all tokens; `first` starts new sums.
    static DEVICE_MEMBER void multiply_step(SharedAddress x, int lane, bool first, bool even,
                                            const u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4], u32 (&b)[4],
                                            float (&product)[accumulators][4]) {
        const float nothing[4] = {0, 0, 0, 0};
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            if (TOKEN_TILES == 1) {
                if (even) load_two_steps(x, lane, b);
            } else if (tile % 2 == 0) {
                load_two_tiles(x + x_offset(tile * 8, 0), lane, b);
            }
            const int half = TOKEN_TILES == 1 ? (even ? 0 : 2) : tile % 2 * 2;
            UNROLL
            for (int part = 0; part < Fragment::parts; part++)
                UNROLL
                for (int c = 0; c < row_tiles_of_warp; c++) {
                    float(&sum)[4] = product[c * TOKEN_TILES + tile];
                    if (first && part == 0) multiply(sum, fragment[part][c], b[half], b[half + 1], nothing);
                    else multiply(sum, fragment[part][c], b[half], b[half + 1], sum);
                }
        }
    }

    // total += scale * (product + X * shift) for one group.
    DEVICE_MEMBER void scale_group(const Group& group, const float (&x_sums)[token_rows], int lane, const float (&product)[accumulators][4]) {
        float shift[row_tiles_of_warp][2];
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int p = 0; p < 2; p++) shift[c][p] = group.distance[c][p] * Fragment::unit(c, p) - Fragment::bias();
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const float2 sum = *(const float2*)&x_sums[tile * 8 + 2 * (lane % 4)];
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++)
                UNROLL
                for (int e = 0; e < 4; e++) {
                    const int j = c * TOKEN_TILES + tile, p = e >> 1;
                    total[j][e] = fmaf(group.scale[c][p], fmaf(e & 1 ? sum.y : sum.x, shift[c][p], product[j][e]), total[j][e]);
                }
        }
    }
};
