// One launch as a program of its own, for the address sanitizer: every buffer is an allocation of exactly its size.
//
//     program FILE GRID_X GRID_Y GRID_Z BLOCK_X BLOCK_Y BLOCK_Z SHARED_BYTES SEED
//
// FILE holds for each argument two int64 (a kind, then the number of bytes) and the bytes themselves: 0 is a value, 1 a buffer, 2 a
// TensorMap and the elements that it is to point to. They are written back to it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "library.cpp"

struct Argument { int64_t kind, size; char* bytes; };

static std::vector<Argument> read_arguments(FILE* file) {
    std::vector<Argument> all;
    int64_t head[2];
    while (fread(head, 8, 2, file) == 2) {
        // Ends where the data ends.
        char* bytes = (char*)(head[0] == 2 ? aligned_alloc(64, (head[1] + 63) / 64 * 64) : malloc(head[1]));
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
    for (auto& a : all) {
        pointers.push_back(a.kind == 1 ? (void*)&a.bytes : (void*)a.bytes);
        if (a.kind == 2) {
            const size_t size = a.size - sizeof(TensorMap);
            char* elements = (char*)malloc(size);
            memcpy(elements, a.bytes + sizeof(TensorMap), size);
            ((TensorMap*)a.bytes)->elements = elements;
        }
    }
    u32 n[8];
    for (int i = 0; i < 8; i++) n[i] = (u32)strtoul(argv[2 + i], nullptr, 10);
    char message[1024];
    int failed = emulator_launch(n, n + 3, n[6], n[7], pointers.data(), message, sizeof message);
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
