// Entry point of the runtime.
#pragma once
#include "emulator.h"

namespace emulator {
// Run a grid of clusters of `cluster` blocks along x. Return 0, or 1 with an error message of at most `capacity` bytes.
int launch(dim3 grid, dim3 block, u32 cluster, size_t shared_bytes, u32 seed, void (*entry)(void**), void** arguments, char* message, size_t capacity);
} // namespace emulator
