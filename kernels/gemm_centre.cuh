// Codes with what is added to them, offset and zero point, already added: exact in 16 bits for what matquant/inference/gemm_shape.py
// lets through.
#pragma once
#include "gemm_groups.cuh"

DEVICE u32 twice(u16 bits) { return bits | (u32)bits << 16; }

// What a code, c, is multiplied as: unit * (c + distance). For bfloat16's codes of 8 bits: of both nibbles together.
struct Centre {
    u32 add[Fragment::parts][row_tiles_of_warp][2]; // to a fragment, in both halves

    static constexpr DEVICE_CONSTANT float unit(int c, int p) { return Fragment::unit(c, p) * (BFLOAT ? 1.0f : 32768.0f); }

    DEVICE_MEMBER void set(const Group& group) {
        UNROLL
        for (int c = 0; c < row_tiles_of_warp; c++)
            UNROLL
            for (int p = 0; p < 2; p++) {
                const float distance = group.distance[c][p], high = Fragment::parts == 2 ? 16.0f * (int)(distance / 16.0f) : 0.0f;
                if (!BFLOAT) {
                    add[0][c][p] = twice(float_to_half(distance * unit(c, p)));
                } else {
                    if (Fragment::parts == 2) add[0][c][p] = twice(float_to_bfloat(high * unit(c, p)));
                    add[Fragment::parts - 1][c][p] = twice(float_to_bfloat((distance - high) * unit(c, p)));
                }
            }
    }

    DEVICE_MEMBER void apply(u32 (&fragment)[Fragment::parts][row_tiles_of_warp][4]) const {
        UNROLL
        for (int part = 0; part < Fragment::parts; part++)
            UNROLL
            for (int c = 0; c < row_tiles_of_warp; c++)
                UNROLL
                for (int r = 0; r < 4; r++) {
                    u32& f = fragment[part][c][r];
                    const u32 one = 0x3F803F80u, bias = part + 1 == Fragment::parts ? 0xBF80BF80u : 0xC180C180u; /*bug:nibble-bias*/ // -1 or -16
                    if (BFLOAT) f = fma_bfloats(fma_bfloats(f, one, bias), one, add[part][c][r % 2]);
                    else f = fma_halves(f, 0x78007800u, add[part][c][r % 2]); // times 2^15: no longer subnormal
                }
    }
};
