// One kernel as a library: the harness passes its name as STANDIN_KERNEL and its source as STANDIN_SOURCE.
#include STANDIN_SOURCE

extern "C" {

int standin_parameters() { return standin::parameters(STANDIN_KERNEL); }
void standin_parameter_sizes(int* bytes) { standin::sizes(STANDIN_KERNEL, bytes); }

// 0, or 1 with a message of at most `capacity` bytes.
int standin_launch(const u32* grid, const u32* block, u64 shared_bytes, u32 seed, void** arguments, char* message, u64 capacity) {
    standin::forget_exchanges();
    std::string error = standin::run_grid({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, seed,
                                          [](void** a) { standin::call(STANDIN_KERNEL, a); }, arguments);
    snprintf(message, capacity, "%s", error.c_str());
    return !error.empty();
}
}
