// The dense matrix from its bit planes: out[n, k] for some row blocks of 64 and all columns, in the value of gemm.cu,
// gain * s * (code + offset - zero_step * zero), computed in float32 and rounded once.
//
// One warp decodes one tile of 64 rows and 64 columns. Lanes hold its weights in fragment order, two columns of a row at a
// time; through shared memory they become rows, so that a warp stores 128 bytes of each of four rows at once.
//
// Macros  BITS, ROUND, GROUP (of 32 or a multiple of 64, or 0), ZEROS, BFLOAT (of out), SCALE_BFLOAT: as in gemm.cu
// Launch  block  128 threads;  grid  ceil(row blocks * units / 4) with units = ceil(depth / 64), for the row blocks asked for
//         shared  4 * 64 * 144 bytes
#include "fragments.cuh"

#define PLANES (BITS + (ROUND && BITS < 8))

typedef Fragments<BITS, false> Fragment; // subnormals: the code itself, shifted
constexpr int row_bytes = 128 + 16;      // 16 more than a row of a tile, against bank conflicts

DEVICE float value_of(u32 bits) { return SCALE_BFLOAT ? bfloat_to_float((u16)bits) : half_to_float((u16)bits); }
DEVICE u32 rounded(float low, float high) { return BFLOAT ? floats_to_bfloats(low, high) : floats_to_halves(low, high); }

// The value of half h of a fragment's register. The field, code << low, becomes the mantissa of 2^23 + field: a conversion would
// take four times as long.
DEVICE float weight(u32 fragment, int h, int c, int p, float scale, float distance) {
    const u32 bits = h ? fragment >> 16 | 0x4B000000u : and_or(fragment, 0xFFFFu, 0x4B000000u);
    return fmaf(__uint_as_float(bits) - 8388608.0f, 1.0f / (1 << Fragment::low(c, p)), distance) * scale;
}

// What the rows of one lane have in common over a group: scale and distance of rows 16c + 8p + lane / 4.
struct Group {
    float scale[4][2], distance[4][2];
};

DEVICE Group load_group(const u16* scales, const u8* zeros, u64 place, float offset, float zero_step, float gain) {
    const uint4 packed = *(const uint4*)(scales + place);
    const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
    Group group;
    UNROLL
    for (int c = 0; c < 4; c++)
        UNROLL
        for (int p = 0; p < 2; p++) {
            group.scale[c][p] = value_of(pairs[c] >> (16 * p)) * gain;
            group.distance[c][p] = ZEROS ? offset - zero_step * zeros[place + 2 * c + p] : offset;
        }
    return group;
}

// Copies a tile from shared memory to its place in out; pieces of 16 bytes where out's rows allow it.
DEVICE void store_tile(const unsigned char* tile, u16* out, int row, int column, int rows, int depth, int lane) {
    for (int i = lane; i < 64 * 8; i += 32) {
        const int r = row + i / 8, k = column + i % 8 * 8;
        const uint4 piece = *(const uint4*)(tile + i / 8 * row_bytes + i % 8 * 16);
        if (r >= rows || k >= depth) continue;
        u16* to = out + (u64)r * depth + k;
        if (depth % 8 == 0) {
            *(uint4*)to = piece;
            continue;
        }
        const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
        for (int j = 0; j < 8 && k + j < depth; j++) to[j] = (u16)(words[j / 2] >> (j % 2 * 16));
    }
}

KERNEL LAUNCH_BOUNDS(128, 4)
void nested_dequantize(const uint4* planes, u64 plane_stride, const u16* scales, const u8* zeros,
                   u16* out,            // [rows, depth], 16-byte aligned: row 0 is the first of first_row_block
                   int first_row_block, // of the whole matrix
                   int rows, int depth, // of out
                   int row_blocks,      // of the whole matrix
                   float offset, float zero_step, float gain) {
    SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = (depth + 63) / 64;
    const int tile_index = blockIdx.x * 4 + warp;
    if (tile_index >= (rows + 63) / 64 * units) return;
    const int block = tile_index / units, unit = tile_index % units, row_block = first_row_block + block;
    unsigned char* tile = memory + warp * 64 * row_bytes;

    uint4 words[PLANES];
    UNROLL
    for (int d = 0; d < PLANES; d++) words[d] = load_streaming(planes + d * plane_stride + ((u64)row_block * units + unit) * 32 + lane);
    Group group;
    UNROLL
    for (int r = 0; r < 4; r++) {
        u32 bits[PLANES];
        UNROLL
        for (int d = 0; d < PLANES; d++) bits[d] = r == 0 ? words[d].x : r == 1 ? words[d].y : r == 2 ? words[d].z : words[d].w;
#if ROUND && BITS < 8
        round_slice<BITS>(bits);
#endif
        u32 fragment[1][4][4];
        Fragment::decode<4>((const u32(&)[BITS])bits, fragment);
        if (r == 0 || GROUP == 32 && r == 2) {
            const int index = GROUP ? (unit * 64 + r * 16) / max(GROUP, 1) : 0;
            group = load_group(scales, zeros, (((u64)index * row_blocks + row_block) * 8 + lane / 4) * 8, offset, zero_step, gain);
        }
        UNROLL
        for (int c = 0; c < 4; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                const float scale = group.scale[c][p], distance = group.distance[c][p];
                UNROLL
                for (int u = 0; u < 2; u++) {
                    const u32 pair = fragment[0][c][p + 2 * u];
                    const u32 both = rounded(weight(pair, 0, c, p, scale, distance), weight(pair, 1, c, p, scale, distance));
                    *(u32*)(tile + (16 * c + 8 * p + lane / 4) * row_bytes + (16 * r + 8 * u + 2 * (lane % 4)) * 2) = both;
                }
            }
    }
    __syncwarp();
    store_tile(tile, out, block * 64, unit * 64, rows, depth, lane);
}
