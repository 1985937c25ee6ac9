// y[M, N] = x[M, K] W^T + bias, for W in bit planes, of which it reads the first BITS. M <= 8 * TOKEN_TILES.
//
// The value of a weight is   gain * s * (2^(8 - BITS) * code + offset - zero)   with s and zero of its group; `code` is the
// slice of BITS bits of an 8-bit code (codes of fewer bits are an 8-bit code's first planes; `gain` and `offset` are scaled).
//
// Work. A block is ROW_WARPS x TILE_WARPS x K_WARPS warps and works on tiles of 64 * ROW_WARPS rows, a chunk of
// 64 * UNITS * K_WARPS columns at a time: each of the K_WARPS takes its own 64 * UNITS columns, each of the TILE_WARPS its
// own 64 / TILE_WARPS rows of 64. All chunks of all tiles in a row, tile by tile, are dealt out to the blocks in equal runs, so
// a run may end or begin within a tile. Where several blocks have worked on a tile, each leaves its sums in the workspace, and
// the warp that comes last adds them up, always in the same order, and sets its ticket back to 0.
//
// Planes, scales and zero points are copied to shared memory STAGES - 1 chunks before they are used, into a ring that belongs
// to one warp (to the TILE_WARPS that share rows), so that warps do not wait for each other. Activations belong to the whole
// block; they come PANEL chunks at a time, as far ahead as the weights, and the block meets only where a panel begins.
// Weights stay integers in the tensor cores (see fragments.cuh). With t = sum of x * fragment and X = sum of x over a
// group, its part of y is  s * unit^-1 * 2^(8 - BITS) * (t + X * (unit * (offset - zero) / 2^(8 - BITS) - bias));  X is
// computed once per block, by a product with ones.
//
// Macros
//   BITS 2..8, ROUND 0 or 1 (slices are rounded, one plane more is read), GROUP 32, 64, 128 or 0 (a scale per row),
//   ZEROS 0 or 1, BFLOAT 0 or 1 (x, bias and y), SCALE_BFLOAT 0 or 1, TOKEN_TILES 1, 2, 4, 8,
//   ROW_WARPS, K_WARPS, TILE_WARPS (1, 2, 4), UNITS (1, 2, 4), STAGES >= 2, PANEL >= 1, BLOCKS_PER_SM
// Launch
//   block   32 * ROW_WARPS * TILE_WARPS * K_WARPS threads
//   grid    any number of blocks up to row_tiles * chunks; as many as are resident at once is best
//           row_tiles = ceil(N / (64 * ROW_WARPS)), chunks = ceil(ceil(K / 64) / (UNITS * K_WARPS))
//   shared  sizeof(Shared); a launcher that computes it can have it checked with -DSHARED_BYTES
//   workspace  (grid + row_tiles) * 64 * ROW_WARPS * 8 * TOKEN_TILES float32, never initialised
//   tickets    row_tiles * warps of a block, uint32, 0 before the first launch and after every launch
//   A workspace and its tickets serve one launch at a time.
#include "fragments.cuh"

#define PLANES (BITS + (ROUND && BITS < 8))

constexpr int warps = ROW_WARPS * TILE_WARPS * K_WARPS, threads = 32 * warps;
constexpr int row_tiles_of_warp = 4 / TILE_WARPS; // tiles of 16 rows
constexpr int columns = 64 * UNITS;               // of a chunk, for one of the K_WARPS
constexpr int group = GROUP && GROUP < columns ? GROUP : columns; // columns after which sums are scaled
constexpr int groups = columns / group;
constexpr int token_rows = 8 * TOKEN_TILES;
constexpr int x_stride = columns * K_WARPS + 8; // 16 bytes more than a row: ldmatrix then meets every bank once
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
    Weights ring[K_WARPS][ROW_WARPS][STAGES];
    u16 x[x_panels][PANEL][token_rows][x_stride]; // the panel in work and those that are on their way
    float x_sums[PANEL][K_WARPS][groups][token_rows];
#if K_WARPS > 1
    float4 sums[K_WARPS][ROW_WARPS * TILE_WARPS][row_tiles_of_warp * TOKEN_TILES][32];
#endif
};

#ifdef SHARED_BYTES
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher computes the size as well");
#endif

typedef Fragments<BITS, BFLOAT> Fragment;
constexpr int accumulators = row_tiles_of_warp * TOKEN_TILES; // of 16 rows and 8 tokens, 4 floats a lane

struct Problem {
    const uint4* planes;
    u64 plane_stride;
    const u16* scales;
    const u8* zeros;
    const u16* x;
    int tokens, rows, depth;    // M, N, K
    int row_blocks, units;      // of 64 rows, of 64 columns
    int chunks;                 // of a tile
};

// Which of the block's warps this is.
struct Place {
    int lane, row_warp, tile_warp, k_warp;
};

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
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            const int i = plane * UNITS + unit;
            // What is in place of units beyond the last one meets activations of 0.
            if ((TILE_WARPS == 1 || i % TILE_WARPS == at.tile_warp) && (whole || unit < units))
                copy_async(to + (unit * PLANES + plane) * sizeof(uint4[32]) + at.lane * 16, from + unit * 32);
        }
        from += a.plane_stride;
    }
}

DEVICE void copy_scales(const Problem& a, const Place& at, SharedAddress to, int row_block, int unit) {
    if (at.tile_warp != 0) return;
    const int part = at.lane % 8;
    const SharedAddress scales = to + sizeof(uint4[UNITS][PLANES][32]);
    UNROLL
    for (int i = at.lane / 8; i < groups; i += 4) {
        const int column = unit * 64 + i * group;
        const bool inside = column < a.units * 64; // there is no scale beyond, and 0 * NaN is not 0
        const u32 place = inside ? (GROUP ? column / max(GROUP, 1) : 0) * a.row_blocks + row_block : 0;
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
    if (++next.stage == STAGES) next.stage = 0;
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

// The activations of `count` chunks from `chunk` on; after a tile's last chunk comes the next tile's first one. More than a
// panel of them only before the first.
DEVICE void copy_x(const Problem& a, SharedAddress to, int chunk, int count) {
    constexpr int pieces = columns * K_WARPS / 8;
    for (int i = threadIdx.x; i < token_rows * count * pieces; i += threads) {
        const int token = i / pieces % token_rows, slot = i / pieces / token_rows, column = i % pieces * 8;
        if (token >= a.tokens) continue; // such a row only reaches rows of y that nobody keeps
        int from_chunk = chunk + slot;
        while (from_chunk >= a.chunks) from_chunk -= a.chunks;
        const int from = from_chunk * columns * K_WARPS + column;
        const bool inside = from < a.depth;
        copy_async(to + ((slot * token_rows + token) * x_stride + column) * 2, a.x + (inside ? (u64)token * a.depth + from : 0), inside ? 16 : 0);
    }
}

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    if (BFLOAT) mma_bfloat(d, a, b0, b1, c);
    else mma_half(d, a, b0, b1, c);
}

// Activations of 16 columns, as B fragments of two tiles of 8 tokens. x: of the first of them.
DEVICE void load_two_tiles(SharedAddress x, int lane, u32 (&b)[4]) {
    load_matrices(b, x + ((lane % 8 + lane / 16 * 8) * x_stride + lane / 8 % 2 * 8) * 2);
}

// Activations of 32 columns, for one tile of 8 tokens.
DEVICE void load_two_steps(SharedAddress x, int lane, u32 (&b)[4]) { load_matrices(b, x + (lane % 8 * x_stride + lane / 8 * 8) * 2); }

// Where x has a token and a column of a chunk.
DEVICE SharedAddress x_at(SharedAddress chunk, int token, int column) { return chunk + (token * x_stride + column) * 2; }

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
            load_two_steps(x_at(x, slot * token_rows + tile * 8, k_warp * columns + i * group + step * 16), lane, b);
            multiply(even, ones, b[0], b[1], even);
            multiply(odd, ones, b[2], b[3], odd);
        }
        if (lane < 4) *(float2*)&sums[slot][k_warp][i][tile * 8 + 2 * lane] = make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
}

DEVICE float scale_value(u32 bits) { return SCALE_BFLOAT ? bfloat_to_float((u16)bits) : half_to_float((u16)bits); }

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// total += scale * (product + X * shift) for one group.
DEVICE void scale_group(const Weights& weights, const float (&x_sums)[token_rows], const Place& at, int i, float offset, float zero_step,
                        const float (&product)[accumulators][4], float (&total)[accumulators][4]) {
    const u32* scales = (const u32*)&weights.scales[i][at.lane / 4][at.tile_warp * row_tiles_of_warp * 2];
    u32 pairs[4]; // in one load
    if (TILE_WARPS == 1) *(uint4*)pairs = *(const uint4*)scales;
    else if (TILE_WARPS == 2) *(uint2*)pairs = *(const uint2*)scales;
    else pairs[0] = *scales;
    float scale[row_tiles_of_warp][2], shift[row_tiles_of_warp][2];
    UNROLL
    for (int c = 0; c < row_tiles_of_warp; c++) {
        UNROLL
        for (int p = 0; p < 2; p++) {
            scale[c][p] = scale_value(pairs[c] >> (16 * p));
            float distance = offset;
#if ZEROS
            distance -= zero_step * weights.zeros[i][at.lane / 4][(at.tile_warp * row_tiles_of_warp + c) * 2 + p];
#endif
            shift[c][p] = distance * Fragment::unit(c, p) - Fragment::bias();
        }
    }
    UNROLL
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        const float2 sum = *(const float2*)&x_sums[tile * 8 + 2 * (at.lane % 4)];
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int j = c * TOKEN_TILES + tile, p = e >> 1;
                total[j][e] = fmaf(scale[c][p], fmaf(e & 1 ? sum.y : sum.x, shift[c][p], product[j][e]), total[j][e]);
            }
    }
}

// The products of one step of 16 columns with all tokens; `first` starts new sums.
DEVICE void multiply_step(SharedAddress x, int lane, bool first, bool even, const u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4],
                          u32 (&b)[4], float (&product)[accumulators][4]) {
    const float nothing[4] = {0, 0, 0, 0};
    UNROLL
    for (int tile = 0; tile < TOKEN_TILES; tile++) {
        if (TOKEN_TILES == 1) {
            if (even) load_two_steps(x, lane, b);
        } else if (tile % 2 == 0) {
            load_two_tiles(x_at(x, tile * 8, 0), lane, b);
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

DEVICE void multiply_chunk(const Weights& weights, SharedAddress x, const float (&x_sums)[groups][token_rows], const Place& at, float offset, float zero_step,
                           float (&total)[accumulators][4]) {
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
            u32 planes[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) {
                planes[d] = word(words[d], r);
                // Brings this warp's rows to the place of the first ones.
                if (TILE_WARPS > 1) planes[d] = rotate_right(planes[d], at.tile_warp * row_tiles_of_warp * 2);
            }
#if ROUND && BITS < 8
            round_slice<BITS>(planes);
#endif
            u32 fragment[Fragment::parts][row_tiles_of_warp][4];
            Fragment::decode<row_tiles_of_warp>((const u32(&)[BITS])planes, fragment);
            multiply_step(x_at(x, 0, step * 16), at.lane, step % steps_of_group == 0, r % 2 == 0, fragment, b, product);
            if (step % steps_of_group == steps_of_group - 1) {
                const int i = step / steps_of_group;
                scale_group(weights, x_sums[i], at, i, offset, zero_step, product, total);
            }
        }
    }
}

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
        if (n >= out.rows) continue;
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

DEVICE void share_sums(Shared& shared, const Place& at, const float (&total)[accumulators][4], float4 (&sums)[shares]) {
#if K_WARPS == 1
    UNROLL
    for (int j = 0; j < accumulators; j++) sums[j] = make_float4(total[j][0], total[j][1], total[j][2], total[j][3]);
#else
    const int rows = at.row_warp * TILE_WARPS + at.tile_warp;
    UNROLL
    for (int j = 0; j < accumulators; j++)
        shared.sums[at.k_warp][rows][j][at.lane] = make_float4(total[j][0], total[j][1], total[j][2], total[j][3]);
    __syncthreads();
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
    _Pragma("unroll 4")
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
    device_fence(); // by each lane, after its stores
    __syncwarp();
    u32 earlier = 0;
    if (lane == 0) earlier = atomicAdd(ticket, 1u);
    earlier = __shfl_sync(~0u, earlier, 0);
    if (earlier != count - 1) return false;
    if (lane == 0) *ticket = 0;
    device_fence();
    return true;
}

// What this block has summed of a tile goes to y, or to the workspace if other blocks work on the tile too.
DEVICE void finish_tile(const Problem& a, const Output& out, Shared& shared, const Place& at, u32 tile, u32 all, float gain,
                        float4* workspace, u32* tickets, float (&total)[accumulators][4]) {
    UNROLL
    for (int j = 0; j < accumulators; j++)
        UNROLL
        for (int e = 0; e < 4; e++) total[j][e] *= gain / Fragment::unit(j / TOKEN_TILES, e >> 1);
    float4 sums[shares];
    share_sums(shared, at, total, sums);
    const int row_block = (int)tile * ROW_WARPS + at.row_warp;
    if (row_block >= a.row_blocks || at.k_warp >= accumulators) return;
    const u32 first = block_of(tile * a.chunks, all), last = block_of((tile + 1) * a.chunks - 1, all);
    if (first != last) {
        leave_sums(workspace, blockIdx.x, tile, at, sums);
        if (!is_last(tickets + tile * warps + threadIdx.x / 32, last - first + 1, at.lane)) return;
        collect_sums(workspace, first, last, tile, at, sums);
    }
    UNROLL
    for (int i = 0; i < shares; i++) {
        const int j = at.k_warp + i * K_WARPS;
        if (j >= accumulators) continue;
        const int row = row_block * 64 + (at.tile_warp * row_tiles_of_warp + j / TOKEN_TILES) * 16;
        write_output(out, row, j % TOKEN_TILES * 8, at.lane, sums[i]);
    }
}

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
                 const u16* x,         // [M, K], 16-byte aligned, K a multiple of 8
                 const u16* bias,      // [N] or null
                 u16* y,               // [M, N]
                 float4* workspace, u32* tickets, int tokens, int rows, int depth,
                 float offset,    // offset / 2^(8 - BITS)
                 float zero_step, // of a zero point: 2^(8 - master bits) / 2^(8 - BITS)
                 float gain) {    // gain * 2^(8 - BITS)
    SHARED_MEMORY(memory);
    Shared& shared = *(Shared*)memory;
    const int warp = threadIdx.x / 32;
    const Place at = {(int)threadIdx.x % 32, warp % ROW_WARPS, warp / ROW_WARPS % TILE_WARPS, warp / (ROW_WARPS * TILE_WARPS)};
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
    const SharedAddress x_first = shared_address(shared.x);
    copy_x(a, x_first, chunk, min(count, (u32)(panels_ahead * PANEL)));
    copy_async_commit();
    _Pragma("unroll 1") for (u32 i = 0; i < STAGES - 1; i++) {
        if (i < count) copy_weights(a, at, next);
        copy_async_commit(); // an empty group at the end, so that counting groups stays right
    }

    float total[accumulators][4] = {};
    u32 stage = 0, slot = 0;
    SharedAddress panel = x_first, last_panel = x_first + panels_ahead * sizeof(shared.x[0]);
    for (u32 i = 0; i < count; i++) {
        copy_async_wait<STAGES - 2>(); // this thread's copies of this chunk's weights and of its panel
        if (slot == 0) {
            __syncthreads(); // all threads' copies of the panel are there, and nobody needs the one before it any more
            const u32 first = i + panels_ahead * PANEL;
            if (first < count) copy_x(a, last_panel, chunk + panels_ahead * PANEL, min(count - first, (u32)PANEL));
            sum_x(panel, shared.x_sums, min(count - i, (u32)PANEL), at.lane, warp);
            __syncthreads();
        }
        meet(at); // this chunk's weights are there, and the last one's are done with
        if (i + STAGES - 1 < count) copy_weights(a, at, next);
        copy_async_commit();
        multiply_chunk(ring[stage], x_at(panel, slot * token_rows, at.k_warp * columns), shared.x_sums[slot][at.k_warp], at, offset, zero_step, total);
        if (++stage == STAGES) stage = 0;
        if (++slot == PANEL) {
            slot = 0;
            last_panel = panel;
            panel = panel == x_first + panels_ahead * sizeof(shared.x[0]) ? x_first : panel + sizeof(shared.x[0]);
        }
        if (++chunk == (u32)a.chunks || i + 1 == count) {
            finish_tile(a, out, shared, at, tile, all, gain, workspace, tickets, total);
            UNROLL
            for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
            chunk = 0;
            tile++;
        }
    }
    copy_async_wait<0>();
}
