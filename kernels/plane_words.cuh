// Bit-plane words of one k-step, and the macros BITS and ROUND as constants.
#pragma once
#include "fragments.cuh"

constexpr int kPlanes = BITS + (ROUND && BITS < 8); // planes read: `round` slicing reads one plane more than the slice has bits
constexpr int kStepK = 16;                          // columns of a k-step, the K of one MMA

DEVICE u32 select_word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Load the words of k-step `step` (0..3) of a 64-column unit, rounded for `round` slicing. words: 16 bytes of each plane.
DEVICE void load_step_planes(const uint4 (&words)[kPlanes], int step, u32 (&planes)[kPlanes]) {
    UNROLL
    for (int d = 0; d < kPlanes; d++) planes[d] = select_word(words[d], step);
#if ROUND && BITS < 8
    round_slice<BITS>(planes);
#endif
}

// The first BITS planes, after rounding.
DEVICE const u32 (&slice_planes(const u32 (&planes)[kPlanes]))[BITS] { return (const u32(&)[BITS])planes; }
