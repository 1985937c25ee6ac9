// Warp-specialized nested GEMM for sm_90a: y[M, N] = x[M, K] W[N, K]^T + bias as in gemm.cu, for compute-bound M.
//
// One producer thread issues TMA loads of planes, scales and x, with as few loads as possible per k-tile (each occupies the copy engine for
// about 75 cycles on an H200). Two to four consumer warpgroups dequantize a batch of k-steps while WGMMA executes the batch before. A full
// barrier counts the bytes of a stage. A stage is released (empty barrier) after the first batch of the following stage. Consumer warps do
// not synchronize with each other. The producer is in a warpgroup of its own, because registers are reallocated per warpgroup; its other
// threads exit.
//
// Weights are dequantized to the dtype of x in registers, rounded like a dense matrix in that dtype: scaling in the accumulators would
// require draining WGMMA at every group. Exception: 8-bit codes in bfloat16 are rounded twice, once per nibble.
//
// Schedule
//   CLUSTER > 1: as in gemm.cu, the blocks of a cluster share an output tile. Partial sums are exchanged in the memory of the stages.
//   CLUSTER = 1: output tiles as in gemm.cu, in data-parallel waves of persistent blocks, then stream-K for the remaining tiles
//   (tile_scheduler.cuh). WHOLE_TILES: waves alone.
//
// Macros and launch as in gemm.cu, except for
//   WGMMA       1
//   WARPS_K     1
//   BLOCK_M     16, 32, 64, 128 or 256
//   WHOLE_TILES optional: 1 for no stream-K, if CLUSTER is 1
//   X_STAGE_TILES  unused; x has the stages of the weights
//   SHARED_BYTES  optional: sizeof(WarpSpecializedSharedStorage)
//   block       32 * (BLOCK_N / 64 * ROW_BLOCK_WARPS + 4) threads: 8, 12 or 16 consumer warps, 4 producer warps
//   grid        1 .. tiles * k_tiles blocks; best is one per multiprocessor. tiles * CLUSTER blocks for CLUSTER > 1
//               tiles = ceil(M / BLOCK_M) * ceil(N / BLOCK_N); stream-K distributes tiles % grid of them
//   workspace   (grid + tiles % grid) * BLOCK_N * BLOCK_M float32; not used for CLUSTER > 1
//   semaphores  tiles % grid * consumer warps; not used for CLUSTER > 1
#include "epilogue.cuh"
#include "scale_folding.cuh"
#include "tile_scheduler.cuh"
#include "warp_fragments.cuh"

static_assert(WGMMA && WARPS_K == 1 && kWarps >= 8 && kWarps <= 16, "two to four consumer warpgroups");

constexpr int kTmaAlignment = 128; // bytes, of the destination of a load
// Registers per thread, in multiples of 8: of a launch, and after those of the producer have been given to the consumers.
constexpr int kProducerThreads = 128;
constexpr int kLaunchRegisters = 65536 / (kThreads + kProducerThreads) / 8 * 8;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = (kLaunchRegisters * (kThreads + kProducerThreads) - kProducerRegisters * kProducerThreads) / kThreads / 8 * 8;

// Stages of the pipeline.
struct LoadStages {
    alignas(kTmaAlignment) u8 x[kNumStages][kUnits][kXUnitBytes]; // first: the swizzled tiles of TMA need an alignment of 1024 bytes
    uint4 planes[kNumStages][kPlanes][kRowBlocks][kUnits][32];
    u16 scales[kNumStages][kGroups][kRowBlocks][8][8]; // [lane / 4][c, p]
#if ZEROS
    struct alignas(kTmaAlignment) { u8 of[kGroups][kRowBlocks][8][8]; } zeros[kNumStages];
#endif

    // Affine parameters of a warp's rows in one group of a stage.
    DEVICE_MEMBER GroupScales<kRowTiles> load_group(u32 stage, int group, const WarpCoord& coord, float offset, float zero_step) const {
        const int first = coord.warp_in_row_block * kRowTiles * 2;
#if ZEROS
        const u8* of_zeros = zeros[stage].of[group][coord.row_block][coord.lane / 4];
#else
        const u8* of_zeros = nullptr;
#endif
        return load_group_scales<kRowTiles>(scales[stage][group][coord.row_block][coord.lane / 4], of_zeros, first, offset, zero_step);
    }
};

struct WarpSpecializedSharedStorage {
    union {
        LoadStages stages;
#if CLUSTER > 1
        float4 cluster_sums[CLUSTER][kWarpsN][kClusterShares][32]; // from each block of the cluster, after the last stage has been read
#endif
    };
    u64 full_barriers[kNumStages], empty_barriers[kNumStages];
#if CLUSTER > 1
    u64 cluster_barrier; // completes when the partial sums have arrived
#endif
};

constexpr u32 kWeightBytes = kPlanes * kUnits * 512 + kGroups * (ZEROS ? 192 : 128); // of one stage and row block
constexpr u32 kStageBytes = kUnits * kXUnitBytes + kRowBlocks * kWeightBytes; /*bug:expect-bytes*/

#ifdef SHARED_BYTES
static_assert(sizeof(WarpSpecializedSharedStorage) == SHARED_BYTES, "SHARED_BYTES of the launcher must equal the size of the shared storage");
#endif

// Stage index and mbarrier parity of a pipeline.
struct PipelineState {
    u32 index, parity;

    DEVICE_MEMBER void advance() {
        if (++index < kNumStages) return;
        index = 0;
        parity ^= 1;
    }
};

// TMA descriptors. Boxes that exceed an array are zero-filled: rows beyond N are not stored; columns beyond K have scales and x of 0.
struct TmaDescriptors {
    const TensorMap *planes, *scales, *zeros, *x;
};

// Load one k-tile into a stage after its empty barrier. is_empty: the stage was never filled.
DEVICE void load_stage(const TmaDescriptors& from, WarpSpecializedSharedStorage& shared, u32 row_tile, u32 token_tile, u32 k_tile,
                       const PipelineState& stage, bool is_empty) {
    const int row_block = (int)row_tile * kRowBlocks, unit = (int)k_tile * kUnits, s = stage.index;
    const SharedAddress full_barrier = shared_address(shared.full_barriers + s);
    if (!is_empty) mbarrier_wait(shared_address(shared.empty_barriers + s), stage.parity ^ 1); /*bug:empty-wait*/
    mbarrier_arrive_expect_tx(full_barrier, kStageBytes);
    tma_load_3d(shared_address(shared.stages.planes[s]), from.planes, 0, row_block, unit * 64, full_barrier);
    const int index = GROUP ? unit * 64 / max(GROUP, 1) : 0; /*bug:ws-scale-group*/
    tma_load_2d(shared_address(shared.stages.scales[s]), from.scales, index, row_block * 16, full_barrier);
#if ZEROS
    tma_load_2d(shared_address(shared.stages.zeros[s].of), from.zeros, index, row_block * 8, full_barrier);
#endif
    for (int j = 0; j < kUnits; j++)
        tma_load_2d(shared_address(shared.stages.x[s][j]), from.x, (int)token_tile * kBlockM, (unit + j) * 64, full_barrier);
}

// Producer thread: load the k-tiles of all work units of the block, in order.
DEVICE void produce(const TmaDescriptors& from, WarpSpecializedSharedStorage& shared, TileScheduler scheduler, u32 token_tiles) {
    PipelineState stage = {0, 0};
    bool first_pass = true; // all stages are still empty
    for (WorkUnit unit; scheduler.next(unit);)
        for (u32 i = 0; i < unit.k_tiles; i++) {
            const u32 row_tile = unit.tile / token_tiles, token_tile = unit.tile % token_tiles; /*bug:token-tile*/
            load_stage(from, shared, row_tile, token_tile, unit.first_k_tile + i, stage, first_pass);
            stage.advance();
            first_pass = first_pass && stage.index;
        }
}

// K-steps whose WGMMAs are issued together: fewer synchronize the warps of a warpgroup more often, more need more registers.
constexpr int kBatchSteps = kUnits > 1 && kRowTiles == 1 ? 4 : 2;
static_assert(kUnits * 4 / kBatchSteps % 2 == 0, "a k-tile leaves the double buffer as it was");
typedef u32 BatchFragments[kBatchSteps][kRowTiles][4];

struct WarpSpecializedMainloop {
    Accumulator accumulator;
    BatchFragments batch[2]; // double buffer: WGMMA may still read the previous batch

    // Add the products of the k-tile in a stage. release: empty barrier of the previous stage, 0 if there is none. This warp arrives at
    // it after its first WGMMAs, when those of the previous stage are complete.
    DEVICE_MEMBER void add_k_tile(const WarpSpecializedSharedStorage& shared, u32 stage, const WarpCoord& coord, float offset, float zero_step,
                                  float gain, SharedAddress release) {
        const SharedAddress x = shared_address(shared.stages.x[stage]);
        ZeroPointFolding zero_point;
        ScaleFolding scale;
        UNROLL
        for (int unit = 0; unit < kUnits; unit++) {
            uint4 words[kPlanes];
            UNROLL
            for (int d = 0; d < kPlanes; d++) words[d] = shared.stages.planes[stage][d][coord.row_block][unit][coord.lane];
            UNROLL
            for (int r = 0; r < 4; r++) {
                const int step = unit * 4 + r;
                if (step % kStepsPerGroup == 0) {
                    const GroupScales<kRowTiles> group = shared.stages.load_group(stage, step / kStepsPerGroup, coord, offset, zero_step);
                    zero_point.set(group);
                    scale.set(group, gain);
                }
                BatchFragments& fragments = batch[step / kBatchSteps % 2];
                dequantize_step(words, r, coord, zero_point, scale, fragments[r % kBatchSteps]); // overlaps with the previous batch's WGMMAs
                if ((r + 1) % kBatchSteps) continue;
                accumulator.multiply_steps(x + unit * kXUnitBytes + (r + 1 - kBatchSteps) * 32, fragments);
                if (step + 1 == kBatchSteps && release && coord.lane == 0) mbarrier_arrive(release);
            }
        }
    }

  private:
    // A fragments of k-step `step` of a unit, as weights in the dtype of x.
    static DEVICE_MEMBER void dequantize_step(const uint4 (&words)[kPlanes], int step, const WarpCoord& coord, const ZeroPointFolding& zero_point,
                                              const ScaleFolding& scale, u32 (&weights)[kRowTiles][4]) {
        StepFragments fragments;
        unpack_rotated_masks(words, step, coord, fragments);
        zero_point.apply(fragments);
        scale.apply(fragments);
        UNROLL
        for (int c = 0; c < kRowTiles; c++)
            UNROLL
            for (int r = 0; r < 4; r++) weights[c][r] = fragments[0][c][r];
    }
};

// Multiply the k-tiles of a work unit. stage, release: of the pipeline, carried from one unit to the next.
DEVICE void multiply_unit(const WarpSpecializedSharedStorage& shared, const WarpCoord& coord, u32 k_tiles, float offset, float zero_step,
                          float gain, PipelineState& stage, SharedAddress& release, WarpSpecializedMainloop& mainloop) {
    mainloop.accumulator.clear();
    _Pragma("unroll 1") for (u32 i = 0; i < k_tiles; i++, stage.advance()) {
        mbarrier_wait(shared_address(shared.full_barriers + stage.index), stage.parity); /*bug:full-wait*/
        mainloop.add_k_tile(shared, stage.index, coord, offset, zero_step, gain, release); /*bug:consume*/
        release = shared_address(shared.empty_barriers + stage.index); /*bug:release-stage*/
    }
    mainloop.accumulator.wait(); /*bug:epilogue-wait*/
}

#if CLUSTER > 1
KERNEL CLUSTER_DIMS(CLUSTER) LAUNCH_BOUNDS(kThreads + kProducerThreads, 1)
#else
KERNEL LAUNCH_BOUNDS(kThreads + kProducerThreads, 1)
#endif
void nested_gemm_sm90_ws(const GRID_CONSTANT TensorMap planes, // box: all planes read, BLOCK_N / 64 row blocks, BLOCK_K * 8 bytes
                         const GRID_CONSTANT TensorMap scales, // box: the groups of a k-tile, BLOCK_N * 2 bytes
#if ZEROS
                         const GRID_CONSTANT TensorMap zeros, // box: the groups of a k-tile, BLOCK_N bytes
#else
                         const TensorMap* zeros, // null
#endif
                         const GRID_CONSTANT TensorMap x, // box [BLOCK_M, 64], 128-byte swizzle
                         const u16* bias, u16* y, float4* workspace, u32* tile_semaphores, int tokens, int rows, int depth, float offset,
                         float zero_step, float gain) {
    SHARED_MEMORY(memory);
    WarpSpecializedSharedStorage& shared = *(WarpSpecializedSharedStorage*)memory;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0); // warp-uniform for the compiler
    const WarpCoord coord = {(int)threadIdx.x % 32, warp % kRowBlocks, warp / kRowBlocks % ROW_BLOCK_WARPS, 0};
#if ZEROS
    const TmaDescriptors from = {&planes, &scales, &zeros, &x};
#else
    const TmaDescriptors from = {&planes, &scales, nullptr, &x};
#endif
    GemmArgs args = {nullptr, 0, nullptr, nullptr, nullptr, tokens, rows, depth, (rows + 63) / 64, 0, (depth + 63) / 64, 0};
    args.k_tiles = (args.units + kUnits - 1) / kUnits;
    const u32 token_tiles = (tokens + kBlockM - 1) / kBlockM;
    const Output out = {y, bias, tokens, rows};
    TileScheduler scheduler;
    scheduler.start((u32)(args.row_blocks + kRowBlocks - 1) / kRowBlocks * token_tiles, args.k_tiles);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kNumStages; i++) {
            mbarrier_init(shared_address(shared.full_barriers + i), 1);
            mbarrier_init(shared_address(shared.empty_barriers + i), kWarps); /*bug:empty-arrivals*/
        }
#if CLUSTER > 1
        expect_cluster_sums(shared, blockIdx.x % CLUSTER);
#endif
    }
    __syncthreads();
    pdl_wait();
    pdl_launch_dependents();
    if (warp >= kWarps) {
        warpgroup_reg_dealloc<kProducerRegisters>();
        if (threadIdx.x == kThreads) produce(from, shared, scheduler, token_tiles);
        return;
    }
    warpgroup_reg_alloc<kConsumerRegisters>();
    PipelineState stage = {0, 0};
    SharedAddress release = 0;
#if CLUSTER > 1
    WorkUnit unit = {blockIdx.x / CLUSTER, 0, 0};
    scheduler.next(unit); // false in a block without k-tiles
    WarpSpecializedMainloop mainloop;
    multiply_unit(shared, coord, unit.k_tiles, offset, zero_step, gain, stage, release, mainloop);
    // Orders no memory: what this thread read from the stages has arrived in registers that its completed WGMMAs used.
    cluster_arrive_relaxed();
    const int first_token = (int)(unit.tile % token_tiles) * kBlockM; /*bug:cluster-token-tile*/
    cluster_epilogue(args, out, shared, coord, unit.tile / token_tiles, first_token, blockIdx.x % CLUSTER, mainloop.accumulator);
#else
    for (WorkUnit unit; scheduler.next(unit);) {
        WarpSpecializedMainloop mainloop;
        multiply_unit(shared, coord, unit.k_tiles, offset, zero_step, gain, stage, release, mainloop);
        const bool whole = unit.k_tiles == scheduler.k_tiles_per_tile;
        const OutputTile tile = {unit.tile / token_tiles, unit.tile % token_tiles, whole ? 0 : unit.tile - scheduler.first_stream_k_tile(),
                                 whole ? 0 : scheduler.stream_k_total};
        epilogue(args, out, shared, coord, tile, workspace, tile_semaphores, mainloop.accumulator);
    }
#endif
}
