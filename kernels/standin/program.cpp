// One launch as a program of its own, for the address sanitizer: every buffer is an allocation of exactly its size.
//
//     program FILE GRID_X GRID_Y GRID_Z BLOCK_X BLOCK_Y BLOCK_Z SHARED_BYTES SEED
//
// FILE holds for each argument two int64 (1 for a buffer or 0 for a value, then the bytes) and the bytes themselves; the
// buffers are written back to it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "library.cpp"

struct Argument { int64_t buffer, size; char* bytes; };

static std::vector<Argument> read_arguments(FILE* file) {
    std::vector<Argument> all;
    int64_t head[2];
    while (fread(head, 8, 2, file) == 2) {
        char* bytes = (char*)malloc(head[1]); // aligned to 16, and ends where the data ends
        if (fread(bytes, 1, head[1], file) != (size_t)head[1]) exit(3);
        all.push_back({head[0], head[1], bytes});
    }
    return all;
}

int main(int, char** argv) {
    FILE* file = fopen(argv[1], "rb");
    std::vector<Argument> all = read_arguments(file);
    fclose(file);
    std::vector<void*> pointers;
    for (auto& a : all) pointers.push_back(a.buffer ? (void*)&a.bytes : (void*)a.bytes);
    u32 n[8];
    for (int i = 0; i < 8; i++) n[i] = (u32)strtoul(argv[2 + i], nullptr, 10);
    char message[1024];
    int failed = standin_launch(n, n + 3, n[6], n[7], pointers.data(), message, sizeof message);
    if (failed) fprintf(stderr, "%s\n", message);
    file = fopen(argv[1], "wb");
    for (auto& a : all) {
        fwrite(&a, 8, 2, file);
        fwrite(a.bytes, 1, a.size, file);
        free(a.bytes);
    }
    fclose(file);
    return failed ? 2 : 0;
}
