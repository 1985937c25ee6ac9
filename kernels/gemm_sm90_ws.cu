// y[M, N] = x[M, K] W^T + bias as gemm.cu has it, for so many tokens that the tensor cores are the limit; sm_90a.
//
// One thread of a block asks for what eight warps need: planes, scales and activations of a chunk at a time, in as few copies as can
// be (each costs the copy engine about 75 cycles, on an H200), whose bytes a barrier in shared memory counts. The eight warps,
// four at a time together, decode a step of 16 columns while the tensor cores multiply the step before. They wait for nothing but
// their chunk, and never for each other: a chunk's place is given back when the first products after it are done. Registers are
// given to warps four at a time, so that the one thread comes with three warps that do nothing.
//
// A weight is rounded to the type of x, as a dense matrix would hold it: scaled in the registers, and not in the sums, which would
// have to be complete for it. (bfloat16's with 8 bits, of which each nibble is scaled by itself, are rounded twice.)
//
// Work. Tiles are those of gemm.cu. The blocks take one each, whole, for as many rounds as there are tiles for all of them: they are
// then at the same columns at the same time, and share activations and weights in the second-level cache. The chunks of the
// tiles that are left are dealt out in equal runs, as in gemm.cu.
//
// Macros and launch are those of gemm.cu, but for
//   WGMMA 1, K_WARPS 1, TOKEN_TILES 16 or 32; PANEL is not used
//   block   384 threads, of which ROW_WARPS * TILE_WARPS = 8 warps multiply
//   grid    if there are fewer tiles than blocks left after the last whole round, the blocks share them out
//   workspace  (grid + tiles % grid) * 64 * ROW_WARPS * 8 * TOKEN_TILES float32;  tickets  tiles % grid * 8
#include "gemm_centre.cuh"
#include "gemm_sums.cuh"

static_assert(WGMMA && K_WARPS == 1 && warps == 8, "two times four warps multiply");

constexpr int unit_bytes = token_rows * 128; // of activations, for 64 columns

struct Shared {
    alignas(tile_alignment) u8 x[STAGES][UNITS][unit_bytes];
    uint4 planes[STAGES][PLANES][ROW_WARPS][UNITS][32];
    u16 scales[STAGES][groups][ROW_WARPS][8][8]; // [lane / 4][c][p]
#if ZEROS
    u8 zeros[STAGES][groups][ROW_WARPS][8][8];
#endif
    u64 arrived[STAGES], free[STAGES]; // barriers: of a chunk's bytes, and of the warps that need it no more
};

constexpr u32 bytes_of_chunk = UNITS * unit_bytes + ROW_WARPS * (PLANES * UNITS * 512 + groups * (ZEROS ? 192 : 128)); /*bug:expect-bytes*/

#ifdef SHARED_BYTES
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher computes the size as well");
#endif

// A part of a tile: `count` chunks from number `chunk` on. Tiles of y are counted along the tokens first: blocks that work at the same
// time then share weights in the second-level cache.
struct Piece {
    u32 tile, chunk, count;
};

// What this block does, piece by piece.
struct Work {
    u32 chunks;          // of a tile
    u32 rounds, tile;    // whole tiles that are still to do, and the next of them
    u32 begin, end, all; // its run of the chunks of the tiles that are left after the rounds, and how many those are

    DEVICE_MEMBER void start(u32 tiles, u32 chunks_of_tile) {
        chunks = chunks_of_tile;
        rounds = tiles / gridDim.x;
        tile = blockIdx.x;
        all = tiles % gridDim.x * chunks;
        begin = blockIdx.x * all / gridDim.x;
        end = (blockIdx.x + 1) * all / gridDim.x;
    }

    DEVICE_MEMBER bool next(Piece& piece) {
        if (rounds) {
            piece = {tile, 0, chunks};
            rounds--;
            tile += gridDim.x; /*bug:wave-stride*/
            return true;
        }
        if (begin == end) return false;
        const u32 number = begin / chunks, chunk = begin - number * chunks;
        piece = {first_left() + number, chunk, min(chunks - chunk, end - begin)};
        begin += piece.count;
        return true;
    }

    // The first tile after the rounds, once they are done.
    DEVICE_MEMBER u32 first_left() const { return tile - blockIdx.x; }
};

// A place in shared memory that chunks take in turn.
struct Stage {
    u32 index, phase;

    DEVICE_MEMBER void advance() {
        if (++index < STAGES) return;
        index = 0;
        phase ^= 1;
    }
};

// The arrays in global memory. Tiles that reach beyond an array are filled with 0: rows that nobody keeps, and columns whose scales
// and activations are 0.
struct Arrays {
    const TensorMap *planes, *scales, *zeros, *x;
};

// Asks for one chunk, as soon as its place is free.
DEVICE void ask_for_chunk(const Arrays& from, Shared& shared, u32 row_tile, u32 token_tile, u32 chunk, const Stage& stage, bool is_free) {
    const int row_block = (int)row_tile * ROW_WARPS, unit = (int)chunk * UNITS, s = stage.index;
    const SharedAddress arrived = shared_address(shared.arrived + s);
    if (!is_free) barrier_wait(shared_address(shared.free + s), stage.phase ^ 1); /*bug:empty-wait*/
    barrier_expect(arrived, bytes_of_chunk);
    copy_tile(shared_address(shared.planes[s]), from.planes, 0, row_block, unit * 64, arrived);
    const int index = GROUP ? unit * 64 / max(GROUP, 1) : 0; /*bug:ws-scale-group*/
    copy_tile(shared_address(shared.scales[s]), from.scales, index, row_block * 16, arrived);
#if ZEROS
    copy_tile(shared_address(shared.zeros[s]), from.zeros, index, row_block * 8, arrived);
#endif
    for (int j = 0; j < UNITS; j++)
        copy_tile(shared_address(shared.x[s][j]), from.x, (int)token_tile * token_rows, (unit + j) * 64, arrived);
}

// By one thread: asks for this block's chunks, in their order.
DEVICE void ask_for_chunks(const Arrays& from, Shared& shared, Work work, u32 token_tiles) {
    Stage stage = {0, 0};
    bool all_free = true; // stages, as they are at first
    for (Piece piece; work.next(piece);)
        for (u32 i = 0; i < piece.count; i++) {
            ask_for_chunk(from, shared, piece.tile / token_tiles, piece.tile % token_tiles, piece.chunk + i, stage, all_free); /*bug:token-tile*/
            stage.advance();
            all_free = all_free && stage.index;
        }
}

// What the fragments of a group are multiplied with to be weights. In float16 it is finite for weights whose neighbouring levels are
// less than 128 apart.
struct Scale {
    u32 high[row_tiles_of_warp][2], low[row_tiles_of_warp][2]; // twice; bfloat16 holds a float16 scale in two

    static constexpr bool two = BFLOAT && !SCALE_BFLOAT;

    DEVICE_MEMBER void set(const Group& group, float gain) {
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                const float scale = group.scale[c][p] * gain / Centre::unit(c, p);
                const u16 first = BFLOAT ? float_to_bfloat(scale) : float_to_half(scale);
                high[c][p] = twice(first);
                if (two) low[c][p] = twice(float_to_bfloat(scale - bfloat_to_float(first)));
            }
    }

    // fragment[0] becomes the weights.
    DEVICE_MEMBER void apply(u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4]) const {
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int r = 0; r < 4; r++) {
                u32& f = fragment[0][c][r];
                const u32 s = high[c][r % 2], minus_zero = 0x80008000u;
                if (!BFLOAT) {
                    f = fma_halves(f, s, minus_zero);
                    continue;
                }
                const u32 small = two ? fma_bfloats(f, low[c][r % 2], minus_zero) : minus_zero; /*bug:scale-residual*/
                f = fma_bfloats(f, s, Fragment::parts == 2 ? fma_bfloats(fragment[Fragment::parts - 1][c][r], s, small) : small);
            }
    }
};

struct Sums {
    float total[accumulators][4];
    u32 fragment[2][Fragment::parts][row_tiles_of_warp][4]; // of a step, and of the one that the tensor cores may still read

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
    }

    DEVICE_MEMBER void finish(float) {}

    // Adds the products of the chunk in a stage. before: the barrier of the place of the chunk before this one, which is given back; 0 if there was none.
    DEVICE_MEMBER void add_chunk(const Shared& shared, u32 stage, const Place& at, float offset, float zero_step, float gain, SharedAddress before) {
        const SharedAddress x = shared_address(shared.x[stage]);
        Centre centre;
        Scale scale;
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 words[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) words[d] = shared.planes[stage][d][at.row_warp][unit][at.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                if (step % steps_of_group == 0) {
                    const int g = step / steps_of_group;
#if ZEROS
                    const u8(*zeros)[8] = shared.zeros[stage][g][at.row_warp];
#else
                    const u8(*zeros)[8] = nullptr;
#endif
                    const Group group = load_group(shared.scales[stage][g][at.row_warp], zeros, at, offset, zero_step);
                    centre.set(group);
                    scale.set(group, gain);
                }
                u32 bits[PLANES];
                planes_of_step(words, r, bits);
                // Beside the products of the step before.
                Fragment::decode<row_tiles_of_warp>((const u32(&)[BITS])bits, fragment[step % 2], at.tile_warp * row_tiles_of_warp);
                centre.apply(fragment[step % 2]);
                scale.apply(fragment[step % 2]);
                multiply_step(x + unit * unit_bytes + r * 32, fragment[step % 2][0]);
                if (step == 0 && before && at.lane == 0) barrier_arrive(before);
            }
        }
    }

    // Until all products are summed.
    DEVICE_MEMBER void wait() {
        wgmma_wait<0>();
        UNROLL
        for (int j = 0; j < accumulators; j++) wgmma_done(total[j]);
    }

  private:
    // The products of one step of 16 columns with all tokens. Those of the step before are summed when it returns, so that
    // their fragment may be written again.
    DEVICE_MEMBER void multiply_step(SharedAddress x, const u32 (&step)[row_tiles_of_warp][4]) {
        const WgmmaOperand tokens = wgmma_operand(x);
        wgmma_fence(); /*bug:wgmma-fence*/
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++) wgmma<TOKEN_TILES, BFLOAT>(total + c * TOKEN_TILES, step[c], tokens);
        wgmma_commit();
        wgmma_wait<1>(); /*bug:fragment-wait*/
    }
};

KERNEL LAUNCH_BOUNDS(threads + 128, 1)
void nested_gemm_sm90_ws(const GRID_CONSTANT TensorMap planes, // in tiles of all planes, ROW_WARPS blocks of 64 rows, UNITS * 512 bytes
                      const GRID_CONSTANT TensorMap scales, // in tiles of the groups of a chunk, ROW_WARPS * 128 bytes
#if ZEROS
                      const GRID_CONSTANT TensorMap zeros, // likewise, ROW_WARPS * 64 bytes
#else
                      const TensorMap* zeros, // null
#endif
                      const GRID_CONSTANT TensorMap x, // in tiles of 8 * TOKEN_TILES tokens, 64 columns
                      const u16* bias, u16* y, float4* workspace, u32* tickets, int tokens, int rows, int depth, float offset, float zero_step,
                      float gain) {
    SHARED_MEMORY(memory);
    Shared& shared = *(Shared*)memory;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0); // the compiler then knows that a warp goes one way
    const Place at = {(int)threadIdx.x % 32, warp % ROW_WARPS, warp / ROW_WARPS % TILE_WARPS, 0};
#if ZEROS
    const Arrays from = {&planes, &scales, &zeros, &x};
#else
    const Arrays from = {&planes, &scales, nullptr, &x};
#endif
    Problem a = {nullptr, 0, nullptr, nullptr, nullptr, tokens, rows, depth, (rows + 63) / 64, (depth + 63) / 64, 0};
    a.chunks = (a.units + UNITS - 1) / UNITS;
    const u32 token_tiles = (tokens + token_rows - 1) / token_rows;
    const Output out = {y, bias, tokens, rows};
    Work work;
    work.start((u32)(a.row_blocks + ROW_WARPS - 1) / ROW_WARPS * token_tiles, a.chunks);
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) {
            barrier_set_up(shared_address(shared.arrived + i), 1);
            barrier_set_up(shared_address(shared.free + i), warps); /*bug:empty-arrivals*/
        }
    __syncthreads();
    wait_for_earlier_kernels();
    let_next_kernel_begin();
    if (warp >= warps) {
        keep_registers<40>();
        if (threadIdx.x == threads) ask_for_chunks(from, shared, work, token_tiles);
        return;
    }
    take_registers<232>();
    Stage stage = {0, 0};
    SharedAddress before = 0;
    for (Piece piece; work.next(piece);) {
        Sums sums;
        sums.clear();
        _Pragma("unroll 1") for (u32 i = 0; i < piece.count; i++, stage.advance()) {
            barrier_wait(shared_address(shared.arrived + stage.index), stage.phase); /*bug:full-wait*/
            sums.add_chunk(shared, stage.index, at, offset, zero_step, gain, before); /*bug:consume*/
            before = shared_address(shared.free + stage.index); /*bug:release-stage*/
        }
        sums.wait(); /*bug:epilogue-wait*/
        const bool whole = piece.count == work.chunks;
        finish_tile(a, out, shared, at, piece.tile / token_tiles, piece.tile % token_tiles, whole ? 0 : piece.tile - work.first_left(),
                    whole ? 0 : work.all, gain, workspace, tickets, sums);
    }
}
