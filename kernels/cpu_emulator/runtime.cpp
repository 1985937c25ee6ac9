// Runtime behind emulator.h, compiled once and linked to every kernel.
#include "hopper.h"

#include "launch.h"

int emulator::launch(dim3 grid, dim3 block, u32 cluster, size_t shared_bytes, u32 seed, void (*e)(void**), void** arguments, char* message, size_t capacity) {
    reset_visibility();
    std::string what = run_grid(grid, block, cluster, shared_bytes, seed, e, arguments);
    snprintf(message, capacity, "%s", what.c_str());
    return !what.empty();
}
