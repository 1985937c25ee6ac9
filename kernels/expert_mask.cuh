// Set of experts, passed by value: a captured CUDA graph holds it.
#pragma once
#include "device.cuh"

constexpr int kMaxExperts = 1024;

struct ExpertMask {
    u32 words[kMaxExperts / 32];

    DEVICE_MEMBER bool has(int expert) const { return words[expert / 32] >> (expert % 32) & 1; }

    // Number of experts of the set below `expert`.
    DEVICE_MEMBER int rank(int expert) const {
        int count = __popc(words[expert / 32] & ((1u << expert % 32) - 1)); /*bug:route-rank*/
        for (int i = 0; i < expert / 32; i++) count += __popc(words[i]);
        return count;
    }
};
