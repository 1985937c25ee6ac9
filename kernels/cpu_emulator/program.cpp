// Program that launches one kernel once, for the address sanitizer. Every buffer is an allocation of exactly its size.
//
//     program FILE GRID_X GRID_Y GRID_Z BLOCK_X BLOCK_Y BLOCK_Z SHARED_BYTES SEED
//
// FILE holds per argument two int64 (kind and number of bytes) and the bytes. Kinds: 0 value, 1 buffer, 2 TensorMap followed by the
// elements that it points to. The buffers are written back to FILE. Exit status: 0, 2 after an emulator error, 3 for an invalid FILE.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "library.cpp"

struct Argument { int64_t kind, size; char* bytes; };

static std::vector<Argument> read_arguments(FILE* file) {
    std::vector<Argument> all;
    int64_t head[2];
    while (fread(head, 8, 2, file) == 2) {
        // A TensorMap is aligned to 64 bytes; everything else ends exactly at its last byte.
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
