// The runtime's one entry.
#pragma once
#include "emulator.h"

namespace emulator {
// Runs a grid. 0, or 1 with a message of at most `capacity` bytes that says what went wrong.
int launch(dim3 grid, dim3 block, size_t shared_bytes, u32 seed, void (*entry)(void**), void** arguments, char* message, size_t capacity);
} // namespace emulator
