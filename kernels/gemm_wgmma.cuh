// The products of a chunk by wgmma, four warps together: each brings 16 of 64 rows at a time, and the tensor cores read the
// activations from shared memory by themselves, while the warps decode the next step's weights.
//
// Codes are multiplied with what is added to them, offset and zero point, already added: that is exact in 16 bits for what
// matquant/inference/gemm_shape.py lets through. Sums stay where the tensor cores add to them, in units of the scale of the group in
// work: where a group begins they are multiplied by the old scale over the new one. (There are no registers for a second set.)
#pragma once
#include "gemm_centre.cuh"

static_assert(ROW_WARPS * TILE_WARPS % 4 == 0, "wgmma takes four warps that work on the same columns");

constexpr int unit_bytes = token_rows * 128; // of activations, for 64 columns
static_assert(unit_bytes % tile_alignment == 0, "tiles of activations begin where wgmma can find them");

// The activations' way through shared memory, in tiles of 64 columns that one thread asks for. All threads call its functions
// together.
struct Panels {
    SharedAddress now;
    u32 index, phase; // of the panel in work, and of its barrier

    DEVICE_MEMBER void start(const Problem& a, Shared& shared, u32 chunk, u32 count) {
        now = shared_address(shared.x);
        index = phase = 0;
        if (threadIdx.x == 0)
            for (int i = 0; i < x_panels; i++) barrier_set_up(shared_address(shared.arrived + i), 1);
        __syncthreads();
        if (threadIdx.x == 0)
            for (u32 i = 0; i < panels_ahead && i * PANEL < count; i++)
                ask(a, shared, i, chunk + i * PANEL, min(count - i * PANEL, (u32)PANEL));
    }

    // Where a panel begins. left: chunks from its first one on.
    DEVICE_MEMBER void enter(const Problem& a, Shared& shared, int, int, u32 chunk, u32 left) {
        constexpr u32 ahead = panels_ahead * PANEL;
        __syncthreads(); /*bug:x-stage-empty-sync*/ // nobody needs the panel before it any more
        if (threadIdx.x == 0 && ahead < left)
            ask(a, shared, index == 0 ? x_panels - 1 : index - 1, chunk + ahead, min(left - ahead, (u32)PANEL));
        barrier_wait(shared_address(shared.arrived + index), phase); /*bug:x-full-wait*/
    }

    DEVICE_MEMBER void leave(Shared& shared) {
        now += sizeof(shared.x[0]);
        if (++index < x_panels) return;
        now = shared_address(shared.x);
        index = 0;
        phase ^= 1; /*bug:x-parity*/
    }

  private:
    // Asks for `count` chunks from `chunk` on; after a tile's last chunk comes the next tile's first one.
    static DEVICE_MEMBER void ask(const Problem& a, Shared& shared, u32 panel, u32 chunk, u32 count) {
        const SharedAddress barrier = shared_address(shared.arrived + panel);
        barrier_expect(barrier, count * x_bytes); /*bug:x-expect-bytes*/
        for (u32 slot = 0; slot < count; slot++, chunk++) {
            while (chunk >= (u32)a.chunks) chunk -= a.chunks;
            for (int unit = 0; unit < x_columns / 64; unit++)
                copy_tile(shared_address(shared.x[panel][slot] + unit * unit_bytes), a.x, 0, (int)chunk * x_columns + unit * 64, barrier);
        }
    }
};

// What a warp has summed of a tile.
struct Sums {
    float total[accumulators][4];
    float scale[row_tiles_of_warp][2]; // in units of which the sums are

    DEVICE_MEMBER void clear() {
        UNROLL
        for (int j = 0; j < accumulators; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++) scale[c][0] = scale[c][1] = 1;
    }

    // panel: of activations, in which the chunk is number `slot`.
    DEVICE_MEMBER void add_chunk(const Weights& weights, Shared&, SharedAddress panel, u32 slot, const Place& at, float offset, float zero_step) {
        const SharedAddress x = panel + slot * x_bytes + at.k_warp * UNITS * unit_bytes;
        u32 fragment[2][Fragment::parts][row_tiles_of_warp][4]; // of a step, and of the one that the tensor cores may still read
        Centre centre;
        UNROLL
        for (int unit = 0; unit < UNITS; unit++) {
            uint4 words[PLANES];
            UNROLL
            for (int d = 0; d < PLANES; d++) words[d] = weights.planes[unit][d][at.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                const bool begins = step % steps_of_group == 0;
                Group group;
                if (begins) {
                    group = load_group(weights.scales[step / steps_of_group], weights.zeros_of(step / steps_of_group), at, offset, zero_step);
                    centre.set(group);
                }
                decode_step(words, r, at, fragment[step % 2]); // beside the products of the step before
                centre.apply(fragment[step % 2]);
                if (begins && (GROUP || step == 0)) enter_group(group);
                multiply_step(x + unit * unit_bytes + r * 32, fragment[step % 2]);
            }
        }
        wait(); /*bug:k-tile-wait*/ // the compiler lets products be under way only where all threads go one way, as they do not in copying
    }

    // Every sum times `gain` and in units of y.
    DEVICE_MEMBER void finish(float gain) {
        UNROLL
        for (int j = 0; j < accumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) {
                const int c = j / TOKEN_TILES, p = e >> 1;
                total[j][e] *= gain / Centre::unit(c, p) * scale[c][p];
            }
    }

  private:
    // Until all products are summed.
    DEVICE_MEMBER void wait() {
        wgmma_wait<0>();
        UNROLL
        for (int j = 0; j < accumulators; j++) wgmma_done(total[j]);
    }

    // The products of one step of 16 columns with all tokens. Those of the step before are summed when it returns, so that
    // their fragment may be written again.
    DEVICE_MEMBER void multiply_step(SharedAddress x, const u32 (&step)[Fragment::parts][row_tiles_of_warp][4]) {
        const WgmmaOperand tokens = wgmma_operand(x);
        wgmma_fence(); /*bug:wgmma-fence*/
        UNROLL
        for (int part = 0; part < Fragment::parts; part++)
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++) wgmma<TOKEN_TILES, BFLOAT>(total + c * TOKEN_TILES, step[part][c], tokens);
        wgmma_commit();
        wgmma_wait<1>(); /*bug:fragment-wait*/
    }

    // Sums in units of the group's scale.
    DEVICE_MEMBER void enter_group(const Group& group) {
        float ratio[row_tiles_of_warp][2];
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                // A scale of 0, or one so small that no float16 holds it, must leave the sums finite; 2^-60 of it all is nothing.
                const float least = 0x1p-60f, next = fabsf(group.scale[c][p]) < least ? least : group.scale[c][p];
                ratio[c][p] = scale[c][p] * reciprocal(next); /*bug:scale-ratio*/
                scale[c][p] = next;
            }
        if (!GROUP) return; // one scale for a whole row
        wait(); /*bug:rescale-wait*/
        UNROLL
        for (int j = 0; j < accumulators; j++)
            UNROLL
            for (int e = 0; e < 4; e++) total[j][e] *= ratio[j / TOKEN_TILES][e >> 1];
    }
};
