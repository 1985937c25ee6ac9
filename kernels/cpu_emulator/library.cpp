// Shared library of one kernel. Macros: EMULATOR_KERNEL, its name; EMULATOR_SOURCE, its source file.
#include EMULATOR_SOURCE

#include <utility>

#include "launch.h"

namespace emulator {

// Call a kernel. arguments: one pointer per kernel parameter, as for cuLaunchKernel.
template <class... P, size_t... i> static void call(void (*kernel)(P...), void** arguments, std::index_sequence<i...>) {
    kernel(*(std::remove_cv_t<std::remove_reference_t<P>>*)arguments[i]...);
}
template <class... P> static void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>{});
}
template <class... P> static constexpr int parameters(void (*)(P...)) { return sizeof...(P); }
template <class... P> static void sizes(void (*)(P...), int* bytes) { ((*bytes++ = sizeof(P)), ...); }

} // namespace emulator

#ifndef CLUSTER
#define CLUSTER 1
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int emulator_parameters() { return emulator::parameters(EMULATOR_KERNEL); }
EXPORT void emulator_parameter_sizes(int* bytes) { emulator::sizes(EMULATOR_KERNEL, bytes); }

// Return 0, or 1 with an error message of at most `capacity` bytes.
EXPORT int emulator_launch(const u32* grid, const u32* block, u64 shared_bytes, u32 seed, void** arguments, char* message, u64 capacity) {
    return emulator::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, CLUSTER, shared_bytes, seed,
                           [](void** a) { emulator::call(EMULATOR_KERNEL, a); }, arguments, message, capacity);
}
