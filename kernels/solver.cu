// The row solver of matquant/quantize/gptq/column_solver_cpu.py, step for step, with rows over lanes: the formulas and why they find the
// best of all codes are said there. Compile with -fmad=false, so that a float is what it is on the CPU.
//
//   WIDTHS   K, the widths of the objective, ascending
//   TARGETS  T, the compensated targets: K, or 1 when all widths share one
//   FACTORS  F, the Hessians: K or 1
//   NESTED   1 when a width's cells hold whole cells of the next, else all codes are tried
//   SCALES   dtype of stored scales: 0 float32, 1 float16, 2 bfloat16
//
// choose_scales:   one warp per row, columns over lanes; blocks of 128 threads, grid (rows + 3) / 4.
// solve_columns,
// sweep_columns:   one row per lane, a warp per block, grid (rows + 31) / 32; shared memory for the rows' columns:
//                  T (K in a sweep) x columns x 33 floats. Columns of one row depend on each other, rows do not.
//
// cells is float32 [3, K], as Grid.cells. All matrices are row-major; rows, columns and so on as in rows.py.
#include "device.cuh"

constexpr int lanes = 32, padded = 33; // a padded row of lanes: a column's lanes and a lane's columns lie in other banks
constexpr u32 all_lanes = 0xFFFFFFFFu;

struct Grid {
    float step[WIDTHS], ratio[WIDTHS], cells[WIDTHS];
    float codes, centre;
};

DEVICE Grid load_grid(const float* cells, int codes, float centre) {
    Grid grid;
#pragma unroll
    for (int k = 0; k < WIDTHS; k++) {
        grid.step[k] = cells[k];
        grid.ratio[k] = cells[WIDTHS + k];
        grid.cells[k] = cells[2 * WIDTHS + k];
    }
    grid.codes = (float)codes;
    grid.centre = centre;
    return grid;
}

// The cell of `step` codes whose value is nearest to u.
DEVICE float nearest_cell(float u, float step, float cells, float centre) {
    float cell = floorf(u * (1.0f / step) + (0.5f - centre)); // 1 / step is exact
    return fminf(fmaxf(cell, 0.0f), cells - 1.0f);
}

// Of the `ratio` cells of a higher width that `outer` holds, the nearest to `inner`.
DEVICE float clip_to_cell(float inner, float outer, float ratio) {
    float first = outer * ratio;
    return fminf(fmaxf(inner, first), first + (ratio - 1.0f));
}

// What a code decodes to at width k, in units of a code.
DEVICE float value_of(float code, const Grid& grid, int k) {
    float cell = floorf(code / grid.step[k] + (0.5f - grid.centre));
    return grid.step[k] * (fminf(cell, grid.cells[k] - 1.0f) + grid.centre);
}

// g_k(cell), when `least` holds the m of all higher widths.
DEVICE float cost_within(int k, float cell, const float* u, const float* weight, const Grid& grid, const float* least) {
    float error = u[k] - grid.step[k] * (cell + grid.centre);
    float cost = weight[k] * error * error;
#pragma unroll
    for (int j = 0; j < WIDTHS; j++) {
        if (j <= k) continue;
        cell = clip_to_cell(least[j], cell, grid.ratio[j]);
        error = u[j] - grid.step[j] * (cell + grid.centre);
        cost += weight[j] * error * error;
    }
    return cost;
}

// The best code for the targets u in units of a code, and its cost.
DEVICE float best_nested(const float* u, const float* weight, const Grid& grid, float& cost) {
    constexpr int top = WIDTHS - 1;
    float least[WIDTHS];
    least[top] = nearest_cell(u[top], grid.step[top], grid.cells[top], grid.centre);
    cost = cost_within(top, least[top], u, weight, grid, least);
#pragma unroll
    for (int k = top - 1; k >= 0; k--) {
        float cell = floorf(least[k + 1] * (1.0f / grid.ratio[k + 1]));
        float nearest = nearest_cell(u[k], grid.step[k], grid.cells[k], grid.centre);
        float toward = fminf(fmaxf(nearest - cell, -1.0f), 1.0f);
        cost = cost_within(k, cell, u, weight, grid, least);
        while (cell != nearest) {
            float other = cost_within(k, cell + toward, u, weight, grid, least);
            if (other >= cost) break;
            cell += toward;
            cost = other;
        }
        least[k] = cell;
    }
    float cell = least[0];
#pragma unroll
    for (int k = 1; k < WIDTHS; k++) cell = clip_to_cell(least[k], cell, grid.ratio[k]);
    return clip_to_cell(nearest_cell(u[top], 1.0f, grid.codes, grid.centre), cell, grid.step[top]);
}

DEVICE float best_of_all(const float* u, const float* weight, const Grid& grid, float& cost) {
    constexpr int top = WIDTHS - 1;
    float best = 0.0f;
    cost = __int_as_float(0x7F800000); // infinity
    for (float q = 0.0f; q < grid.codes; q += 1.0f) {
        float other = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            float error = u[k] - value_of(q, grid, k);
            other += weight[k] * error * error;
        }
        bool closer = fabsf(u[top] - (q + grid.centre)) < fabsf(u[top] - (best + grid.centre));
        if (other < cost || (other == cost && closer)) {
            best = q;
            cost = other;
        }
    }
    return best;
}

DEVICE float best_code(const float* u, const float* weight, const Grid& grid, float& cost) {
    return NESTED ? best_nested(u, weight, grid, cost) : best_of_all(u, weight, grid, cost);
}

// ---- scales

// A scale as it is stored. (A double rounded by way of float32: the second rounding meets a tie only where the first hid
// one, about once in 2^29 scales of 16 bits.)
DEVICE float stored_scale(double scale) {
    float f = (float)scale;
#if SCALES == 1
    return half_to_float(float_to_half(f));
#elif SCALES == 2
    return bfloat_to_float(float_to_bfloat(f));
#else
    return f;
#endif
}

// Scale and zero point at which the values of the highest width cover the clipped range low..high: about a given zero
// point, or (NaN) about the whole number that fits the range best.
DEVICE float range_scale(float low, float high, float clip, const Grid& grid, float& zero) {
    float step = grid.step[WIDTHS - 1], span = grid.codes - step;
    double middle = grid.codes * 0.5;
    if (zero == zero) {
        double below = span * 0.5 + (zero - middle), above = span * 0.5 - (zero - middle);
        return stored_scale(fmax(-low / below, high / above) * clip);
    }
    float scale = stored_scale((high - low) * clip / span);
    zero = (float)middle;
    if (scale != 0.0f) zero = fminf(fmaxf(rintf(step * grid.centre - low * clip / scale), 0.0f), grid.codes - 1.0f);
    return scale;
}

KERNEL void choose_scales(const float* targets, const float* importance, const float* lam, const float* cells, int codes,
                          float centre, const float* clips, int clip_count, const float* zero_points, int point_count,
                          int rows, int columns, int first, int last, float* scales, float* zeros) {
    const int row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
    if (row >= rows) return;
    const Grid grid = load_grid(cells, codes, centre);
    const size_t plane = (size_t)rows * columns;
    const float* own = targets + (size_t)row * columns;
    const float* top = own + (TARGETS - 1) * plane;

    float low = 0.0f, high = 0.0f;
    for (int j = first + lane; j < last; j += lanes) {
        low = fminf(low, top[j]);
        high = fmaxf(high, top[j]);
    }
    for (int by = 16; by > 0; by /= 2) {
        low = fminf(low, __shfl_xor_sync(all_lanes, low, by));
        high = fmaxf(high, __shfl_xor_sync(all_lanes, high, by));
    }

    // Every fourth clip about every zero point first, then those beside the best, two and one steps away.
    const int coarse = (clip_count + 3) / 4, trials = clip_count * point_count > 1 ? coarse * point_count + 4 : 0;
    float best = __int_as_float(0x7F800000);
    int best_clip = 0, best_point = 0, around = 0;
    for (int trial = 0; trial < trials; trial++) {
        const int fine = trial - coarse * point_count;
        if (fine == 0 || fine == 2) around = best_clip;
        const int point = fine < 0 ? trial / coarse : best_point;
        const int clip = fine < 0 ? trial % coarse * 4 : around + (2 - fine / 2) * (fine % 2 ? 1 : -1);
        if (clip < 0 || clip >= clip_count) continue;
        float zero = zero_points[point];
        const float scale = range_scale(low, high, clips[clip], grid, zero);
        if (scale == 0.0f) continue;
        const float inverse = 1.0f / scale;
        float total = 0.0f;
        for (int j = first + lane; j < last; j += lanes) {
            float u[WIDTHS], weight[WIDTHS], cost;
#pragma unroll
            for (int k = 0; k < WIDTHS; k++) {
                u[k] = own[(TARGETS == 1 ? 0 : k) * plane + j] * inverse + zero;
                weight[k] = lam[(size_t)k * columns + j] * importance[j];
            }
            best_code(u, weight, grid, cost);
            total += cost;
        }
        for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(all_lanes, total, by);
        total = total * scale * scale;
        if (total < best) {
            best = total;
            best_clip = clip;
            best_point = point;
        }
    }
    if (lane == 0) {
        float zero = zero_points[best_point];
        scales[row] = range_scale(low, high, clips[best_clip], grid, zero);
        zeros[row] = zero;
    }
}

// ---- codes

// Rows of a block's lanes from [count, rows, columns] to shared [count, width, lane], or zeros beyond the last row.
DEVICE void load_tile(float* tile, const float* matrix, int count, int rows, int columns, int first, int width) {
    const int begin = blockIdx.x * lanes, lane = threadIdx.x;
    for (int k = 0; k < count; k++)
        for (int r = 0; r < lanes; r++)
            for (int i = lane; i < width; i += lanes) {
                const size_t row = (size_t)k * rows + begin + r;
                tile[(k * width + i) * padded + r] = begin + r < rows ? matrix[row * columns + first + i] : 0.0f;
            }
    __syncwarp();
}

// Adds amount x coupling[j] to each later column j of this lane's row.
DEVICE void add_to_later(float* tile, float amount, const float* coupling, int i, int width) {
    const int lane = threadIdx.x;
#pragma unroll 8
    for (int j = i + 1; j < width; j++) tile[j * padded + lane] += amount * __ldg(coupling + j);
}

KERNEL void solve_columns(const float* targets, const float* factor, const float* lam, const float* cells, int codes,
                          float centre, int rows, int columns, int first, int width, const float* scales,
                          const float* zeros, u8* chosen, float* errors) {
    SHARED_MEMORY(shared);
    float* tile = (float*)shared;
    load_tile(tile, targets, TARGETS, rows, columns, first, width);
    const Grid grid = load_grid(cells, codes, centre);
    const int lane = threadIdx.x, row = blockIdx.x * lanes + lane;
    const bool real = row < rows;
    const float scale = real ? scales[row] : 0.0f, zero = real ? zeros[row] : 0.0f;
    const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < width; i++) {
        float u[WIDTHS], weight[WIDTHS], cost;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            u[k] = tile[((TARGETS == 1 ? 0 : k) * width + i) * padded + lane] * inverse + zero;
            weight[k] = __ldg(lam + (size_t)k * columns + first + i);
        }
        const float q = best_code(u, weight, grid, cost);
        if (real) chosen[(size_t)row * columns + first + i] = (u8)q;
        // One shared target is fed the plain mean of the widths' errors, as MatGPTQ v1 does.
        const float part = TARGETS == 1 ? 1.0f / WIDTHS : 1.0f;
        float error[TARGETS] = {};
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float* diagonal = factor + (size_t)(FACTORS == 1 ? 0 : k) * width * width + i * width + i;
            error[TARGETS == 1 ? 0 : k] += (u[k] - value_of(q, grid, k)) * scale * (part / __ldg(diagonal));
        }
#pragma unroll
        for (int k = 0; k < TARGETS; k++) {
            if (real) errors[((size_t)k * width + i) * rows + row] = error[k];
            const float* coupling = factor + ((size_t)(FACTORS == 1 ? 0 : k) * width + i) * width;
            add_to_later(tile + k * width * padded, -error[k], coupling, i, width);
        }
    }
}

KERNEL void sweep_columns(const float* gradient, const float* hessian, const float* lam, const float* cells, int codes,
                          float centre, int rows, int columns, int first, int width, const float* scales,
                          u8* chosen, float* moves) {
    SHARED_MEMORY(shared);
    float* tile = (float*)shared;
    load_tile(tile, gradient, WIDTHS, rows, columns, first, width);
    const Grid grid = load_grid(cells, codes, centre);
    const int lane = threadIdx.x, row = blockIdx.x * lanes + lane;
    const bool real = row < rows;
    const float scale = real ? scales[row] : 0.0f;
    const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < width; i++) {
        float u[WIDTHS], weight[WIDTHS], cost;
        const size_t place = (size_t)row * columns + first + i;
        const float old = real ? (float)chosen[place] : 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float* diagonal = hessian + (size_t)(FACTORS == 1 ? 0 : k) * width * width + i * width + i;
            const float slope = tile[(k * width + i) * padded + lane];
            u[k] = value_of(old, grid, k) - slope * inverse * (1.0f / __ldg(diagonal));
            weight[k] = __ldg(lam + (size_t)k * columns + first + i);
        }
        const float q = best_code(u, weight, grid, cost);
        if (real) chosen[place] = (u8)q;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float move = (value_of(q, grid, k) - value_of(old, grid, k)) * scale;
            if (real) moves[((size_t)k * width + i) * rows + row] = move;
            const float* coupling = hessian + ((size_t)(FACTORS == 1 ? 0 : k) * width + i) * width;
            if (__any_sync(all_lanes, move != 0.0f)) add_to_later(tile + k * width * padded, move, coupling, i, width);
        }
    }
}
