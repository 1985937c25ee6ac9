// A fragments of one k-step for the rows of one warp. A warp that is not the first of its row block has row tiles at other bit positions
// (fragments.cuh); either the words or the masks are rotated by this distance.
#pragma once
#include "gemm_config.cuh"

// Rotate the words: needs fewer registers.
DEVICE void unpack_rotated_words(const uint4 (&words)[kPlanes], int step, const WarpCoord& coord, StepFragments& fragment) {
    u32 planes[kPlanes];
    load_step_planes(words, step, planes);
    UNROLL
    for (int d = 0; d < BITS; d++)
        if (ROW_BLOCK_WARPS > 1) planes[d] = rotate_right(planes[d], coord.warp_in_row_block * kRowTiles * 2);
    Fragment::unpack<kRowTiles>(slice_planes(planes), fragment);
}

// Rotate the masks: needs fewer instructions, because the masks are loop-invariant.
DEVICE void unpack_rotated_masks(const uint4 (&words)[kPlanes], int step, const WarpCoord& coord, StepFragments& fragment) {
    u32 planes[kPlanes];
    load_step_planes(words, step, planes);
    Fragment::unpack<kRowTiles>(slice_planes(planes), fragment, coord.warp_in_row_block * kRowTiles);
}
