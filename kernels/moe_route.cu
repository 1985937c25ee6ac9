// Routing of a mixture of experts: pairs of a token and one of its experts, sorted by expert, and cut into items for moe_gemm.cu.
//
// Pairs of one expert keep their order, so that the result does not depend on the schedule. Experts that are not on this device, and ids
// beyond the mask, have no items; their pairs stand at the end of `pairs`, in no particular number.
//
// A thread counts and writes the pairs of one expert. All of them read the same ids at a time, from shared memory.
//
// Macros
//   WIDE_IDS  1 for ids of 64 bits, 0 for 32
//   BLOCK_M   largest number of pairs of an item
//   THREADS   threads of the block, a multiple of 32 and at least the number of experts on this device
// Launch
//   block     THREADS, grid 1
//   shared    (kChunk + 2 * THREADS) * 4 bytes
#include "expert_mask.cuh"

#if WIDE_IDS
typedef long long ExpertId;
#else
typedef int ExpertId;
#endif

constexpr int kChunk = 1024; // ids in shared memory

// Index of an expert among those on this device, or -1.
DEVICE int local_expert(ExpertId id, const ExpertMask& mask) {
    if (id < 0 || id >= kMaxExperts || !mask.has((int)id)) return -1; /*bug:route-absent*/
    return mask.rank((int)id);
}

// Call visit(pair) for every pair of this thread's expert, in order.
template <class Visit> DEVICE void visit_pairs(const ExpertId* ids, int pairs, const ExpertMask& mask, int* chunk, const Visit& visit) {
    for (int first = 0; first < pairs; first += kChunk) {
        const int count = min(kChunk, pairs - first);
        __syncthreads(); /*bug:route-chunk-read*/ // the previous chunk is no longer read
        for (int i = threadIdx.x; i < count; i += THREADS) chunk[i] = local_expert(ids[first + i], mask);
        __syncthreads(); /*bug:route-chunk-written*/
        for (int i = 0; i < count; i++)
            if (chunk[i] == (int)threadIdx.x) visit(first + i); /*bug:route-chunk-index*/
    }
}

// Sum of `value` over the threads before this one, and over all threads in `total`. sums: 2 * THREADS numbers.
DEVICE int exclusive_sum(int value, int* sums, int& total) {
    int sum = value;
    int *from = sums, *to = sums + THREADS;
    for (int distance = 1; distance < THREADS; distance *= 2) {
        from[threadIdx.x] = sum;
        __syncthreads(); /*bug:route-sum*/
        if ((int)threadIdx.x >= distance) sum += from[threadIdx.x - distance];
        int* swap = from;
        from = to;
        to = swap;
    }
    __syncthreads();
    from[threadIdx.x] = sum;
    __syncthreads();
    total = from[THREADS - 1];
    __syncthreads();
    return sum - value;
}

KERNEL LAUNCH_BOUNDS(THREADS, 1)
void moe_route(const ExpertId* ids, // [pairs] expert of each pair
               int pairs,
               const GRID_CONSTANT ExpertMask mask, // experts on this device, in the order of their weights
               int* sorted,           // [pairs] pairs, by expert
               int4* items,           // [max_items] expert among those on this device, first entry of `sorted`, number of pairs, 0
               int max_items) {
    SHARED_MEMORY(memory);
    int *chunk = (int*)memory, *sums = chunk + kChunk;
    pdl_wait();
    pdl_launch_dependents();
    int count = 0;
    visit_pairs(ids, pairs, mask, chunk, [&](int) { count++; });
    int total;
    const int first = exclusive_sum(count, sums, total);
    const int first_item = exclusive_sum((count + BLOCK_M - 1) / BLOCK_M, sums, total); /*bug:route-items*/
    int at = first;
    visit_pairs(ids, pairs, mask, chunk, [&](int pair) { sorted[at++] = pair; });
    for (int i = 0; i * BLOCK_M < count; i++)
        items[first_item + i] = {(int)threadIdx.x, first + i * BLOCK_M, min(BLOCK_M, count - i * BLOCK_M), 0}; /*bug:route-item-size*/
    for (int i = total + threadIdx.x; i < max_items; i += THREADS) items[i] = {0, 0, 0, 0}; /*bug:route-unused*/
}
