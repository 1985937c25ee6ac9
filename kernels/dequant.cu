// Dequantization of bit planes to a dense matrix: out[n, k] for a range of 64-row blocks and all columns, with the weight value of gemm.cu,
// gain * scale * (code + offset - zero_step * zero), computed in float32 and rounded once.
//
// One warp dequantizes one tile of 64 rows and 64 columns. Lanes hold weights in fragment order, two columns of a row at a time. They are
// transposed through shared memory, so that a warp stores 128 contiguous bytes of each of four rows at once.
//
// Macros  BITS, ROUND, STRETCH, GROUP (32, a multiple of 64, or 0), ZEROS, BFLOAT (dtype of out), SCALE_BFLOAT: as in gemm.cu
// Launch  block   128 threads
//         grid    ceil(row blocks of out * units / 4), units = ceil(depth / 64)
//         shared  4 * 64 * 144 bytes
#include "group_scales.cuh"
#include "plane_words.cuh"

typedef Fragments<BITS, false, STRETCH> Fragment; // the bits of a float16 number up to 2047 * 2^-24: the shifted code itself
typedef GroupScales<4> Group;
constexpr int kRowBytes = 128 + 16; // 16 bytes of padding per row of a tile against bank conflicts

DEVICE u32 floats_to_output2(float low, float high) { return BFLOAT ? floats_to_bfloat2(low, high) : floats_to_half2(low, high); }

// Weight in half h of a fragment register. The field code << field_shift becomes the mantissa of 2^23 + field: an integer conversion
// takes four times as long.
DEVICE float dequantize(u32 fragment, int h, int c, int p, float scale, float code_bias) {
    const u32 bits = h ? fragment >> 16 | 0x4B000000u : and_or(fragment, 0xFFFFu, 0x4B000000u);
    return fmaf(__uint_as_float(bits) - 8388608.0f, 1.0f / (1 << Fragment::field_shift(c, p)), code_bias) * scale;
}

// Copy a tile from shared memory to (row, column) of out, in vectors of 16 bytes if the rows of out are aligned to them.
DEVICE void store_tile(const unsigned char* tile, u16* out, int row, int column, int rows, int depth, int lane) {
    for (int i = lane; i < 64 * 8; i += 32) {
        const int r = row + i / 8, k = column + i % 8 * 8;
        const uint4 vector = *(const uint4*)(tile + i / 8 * kRowBytes + i % 8 * 16);
        if (r >= rows || k >= depth) continue;
        u16* to = out + (u64)r * depth + k;
        if (depth % 8 == 0) {
            *(uint4*)to = vector;
            continue;
        }
        const u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
        for (int j = 0; j < 8 && k + j < depth; j++) to[j] = (u16)(words[j / 2] >> (j % 2 * 16));
    }
}

// Write the weights of one k-step to the tile in shared memory.
DEVICE void dequantize_step(const u32 (&fragment)[1][4][4], const Group& group, unsigned char* tile, int step, int lane) {
    UNROLL
    for (int c = 0; c < 4; c++)
        UNROLL
        for (int p = 0; p < 2; p++) {
            const float scale = group.scale[c][p], code_bias = group.code_bias[c][p];
            UNROLL
            for (int u = 0; u < 2; u++) {
                const u32 pair = fragment[0][c][p + 2 * u];
                const u32 weights = floats_to_output2(dequantize(pair, 0, c, p, scale, code_bias), dequantize(pair, 1, c, p, scale, code_bias));
                *(u32*)(tile + (16 * c + 8 * p + lane / 4) * kRowBytes + (16 * step + 8 * u + 2 * (lane % 4)) * 2) = weights;
            }
        }
}

KERNEL LAUNCH_BOUNDS(128, 4)
void nested_dequantize(const uint4* planes, u64 plane_stride, const u16* scales, const u8* zeros, // as in gemm.cu
                       u16* out,            // [rows, depth], 16-byte aligned; row 0 is the first row of first_row_block
                       int first_row_block, // of the whole matrix
                       int rows, int depth, // of out
                       int row_blocks,      // of the stored weight, between the scales of two groups
                       float offset, float zero_step, float gain) {
    SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = (depth + 63) / 64;
    const int tile_index = blockIdx.x * 4 + warp;
    if (tile_index >= (rows + 63) / 64 * units) return;
    const int block = tile_index / units, unit = tile_index % units, row_block = first_row_block + block;
    unsigned char* tile = memory + warp * 64 * kRowBytes;

    uint4 words[kPlanes];
    UNROLL
    for (int d = 0; d < kPlanes; d++) words[d] = load_streaming(planes + d * plane_stride + ((u64)row_block * units + unit) * 32 + lane);
    Group group;
    UNROLL
    for (int step = 0; step < 4; step++) {
        u32 bits[kPlanes];
        load_step_planes(words, step, bits);
        u32 fragment[1][4][4];
        Fragment::unpack<4>(slice_planes(bits), fragment);
        if (step == 0 || GROUP == 32 && step == 2) {
            const int index = GROUP ? (unit * 64 + step * kStepK) / max(GROUP, 1) : 0;
            const u64 first = (((u64)index * row_blocks + row_block) * 8 + lane / 4) * 8;
            group = load_group_scales<4>(scales + first, ZEROS ? zeros + first : nullptr, 0, offset, zero_step, gain);
        }
        dequantize_step(fragment, group, tile, step, lane);
    }
    __syncwarp();
    store_tile(tile, out, block * 64, unit * 64, rows, depth, lane);
}
