// Column solver on the GPU. It follows matquant/quantize/gptq/column_solver_cpu.py step by step, with rows over lanes; the formulas and the
// convexity argument are there. Compile with -fmad=false, so that float32 operations are rounded as on the CPU.
//
// Macros
//   WIDTHS   K: number of bit-widths in the objective, ascending
//   TARGETS  T: number of error-compensated targets: K, or 1 if all bit-widths share one
//   FACTORS  F: number of Hessians: K or 1
//   NESTED   1 if every cell of a bit-width is a union of cells of the next one; 0 to search all codes exhaustively
//   LOW      L: number of bit-widths above four if the steps of later planes are stretched; 0 without a stretch
//   STRETCH  of these steps, in quarters
//   SCALES   dtype of stored scales: 0 float32, 1 float16, 2 bfloat16
// Launch
//   choose_scales                 one warp per row, columns over lanes: 128 threads, (rows + 3) / 4 blocks
//   solve_columns, descend_columns  one row per lane, one warp per block: 32 threads, (rows + 31) / 32 blocks. The columns of a row are
//                                 sequentially dependent, rows are independent. Shared memory: T (solve_columns) or K (descend_columns)
//                                 x columns x 33 floats
//
// cells: float32 [4, K]; per bit-width the codes per cell, the cells per cell of the previous bit-width, the number of cells, and the
// centre of a cell. All matrices are row-major.
#include "device.cuh"

constexpr int kLanes = 32, kStride = 33; // the padding makes accesses along lanes and along columns free of bank conflicts
constexpr u32 kAllLanes = 0xFFFFFFFFu;

// Cells of n bit-widths, ascending.
template <int n> struct CodeGrid {
    float step[n], ratio[n], cells[n], centre[n];
    float unit, code_count, code_centre; // of single codes: distance of their values, number, centre
};
typedef CodeGrid<WIDTHS> Grid;

constexpr int kFirstLow = WIDTHS - LOW; // first bit-width that the stretch changes
constexpr float kStretch = STRETCH * 0.25f;

DEVICE Grid load_code_grid(const float* cells, int code_count, float centre) {
    Grid grid;
#pragma unroll
    for (int k = 0; k < WIDTHS; k++) {
        grid.step[k] = cells[k];
        grid.ratio[k] = cells[WIDTHS + k];
        grid.cells[k] = cells[2 * WIDTHS + k];
        grid.centre[k] = cells[3 * WIDTHS + k];
    }
    grid.unit = 1.0f;
    grid.code_count = (float)code_count;
    grid.code_centre = centre;
    return grid;
}

// Cell of `step` codes whose value is nearest to u.
DEVICE float nearest_cell(float u, float step, float cells, float centre) {
    float cell = floorf(u * (1.0f / step) + (0.5f - centre)); // 1 / step is exact
    return fminf(fmaxf(cell, 0.0f), cells - 1.0f);
}

// Clip cell `inner` of a bit-width to the `ratio` cells that form cell `outer` of the previous one.
DEVICE float clip_to_cell(float inner, float outer, float ratio) {
    float first = outer * ratio;
    return fminf(fmaxf(inner, first), first + (ratio - 1.0f));
}

// Codes of a cell of four bits.
DEVICE float four_bit_step(const Grid& grid) { return grid.code_count * 0.0625f; }

// Dequantized value of a code at bit-width k, in units of a code.
DEVICE float dequantize_code(float code, const Grid& grid, int k) {
    const float cell = floorf(code / grid.step[k] + (0.5f - grid.centre[k]));
    const float value = grid.step[k] * (fminf(cell, grid.cells[k] - 1.0f) + grid.centre[k]);
    if (k < kFirstLow) return value;
    const float size = four_bit_step(grid), middle = size * (floorf(code / size) + 0.5f);
    return middle + kStretch * (value - middle);
}

// Least cost g_k(cell) of bit-widths k and above, given the minima of all higher bit-widths.
template <int n> DEVICE float nested_cost(int k, float cell, const float* u, const float* weight, const CodeGrid<n>& grid, const float* minima) {
    float error = u[k] - grid.step[k] * (cell + grid.centre[k]);
    float cost = weight[k] * error * error;
#pragma unroll
    for (int j = 0; j < n; j++) {
        if (j <= k) continue;
        cell = clip_to_cell(minima[j], cell, grid.ratio[j]);
        error = u[j] - grid.step[j] * (cell + grid.centre[j]);
        cost += weight[j] * error * error;
    }
    return cost;
}

// Code with the least cost for the targets u (in units of a code), for nested cells.
template <int n> DEVICE float best_code_nested(const float* u, const float* weight, const CodeGrid<n>& grid, float& cost) {
    constexpr int top = n - 1;
    float minima[n];
    minima[top] = nearest_cell(u[top], grid.step[top], grid.cells[top], grid.centre[top]);
    cost = nested_cost(top, minima[top], u, weight, grid, minima);
#pragma unroll
    for (int k = top - 1; k >= 0; k--) {
        float cell = floorf(minima[k + 1] * (1.0f / grid.ratio[k + 1]));
        float nearest = nearest_cell(u[k], grid.step[k], grid.cells[k], grid.centre[k]);
        float toward = fminf(fmaxf(nearest - cell, -1.0f), 1.0f);
        cost = nested_cost(k, cell, u, weight, grid, minima);
        while (cell != nearest) {
            float other = nested_cost(k, cell + toward, u, weight, grid, minima);
            if (other >= cost) break;
            cell += toward;
            cost = other;
        }
        minima[k] = cell;
    }
    float cell = minima[0];
#pragma unroll
    for (int k = 1; k < n; k++) cell = clip_to_cell(minima[k], cell, grid.ratio[k]);
    return clip_to_cell(nearest_cell(u[top], grid.unit, grid.code_count, grid.code_centre), cell, grid.step[top] / grid.unit);
}

#if LOW
// Error of bit-width k < kFirstLow in a cell of four bits.
DEVICE float error_of_cell(int k, float cell, float size, const float* u, const Grid& grid) {
    return u[k] - grid.step[k] * (floorf(cell * (size / grid.step[k])) + 0.5f);
}

// Best code within a cell of four bits, and its cost. low: the bit-widths from kFirstLow on, relative to the centre of the cell.
DEVICE float best_code_of_cell(float cell, const float* u, const float* weight, const Grid& grid, const CodeGrid<LOW>& low, float& cost) {
    const float size = four_bit_step(grid);
    float low_u[LOW];
#pragma unroll
    for (int k = 0; k < LOW; k++) low_u[k] = u[kFirstLow + k] - size * (cell + 0.5f);
    const float code = best_code_nested<LOW>(low_u, weight + kFirstLow, low, cost) + cell * size;
#pragma unroll
    for (int k = 0; k < kFirstLow; k++) {
        const float error = error_of_cell(k, cell, size, u, grid);
        cost += weight[k] * error * error;
    }
    return code;
}

// Lower bound of the cost of all codes within a cell of four bits, or further in the direction, 1 or -1.
DEVICE float bound_from_cell(float cell, float direction, const float* u, const float* weight, const Grid& grid) {
    const float size = four_bit_step(grid);
    float bound = 0.0f;
#pragma unroll
    for (int k = 0; k < WIDTHS; k++) {
        const float distance = k < kFirstLow ? -direction * error_of_cell(k, cell, size, u, grid)
                                             : direction * (size * (cell + 0.5f) - u[k]) - kStretch * (size - grid.step[k]) * 0.5f;
        const float beyond = fmaxf(distance, 0.0f);
        bound += weight[k] * beyond * beyond;
    }
    return bound;
}

// Code with the least cost where later planes are stretched: cells of four bits from the nearest one on, in both directions, as long as
// their bounds are below the least cost found.
DEVICE float best_code_stretched(const float* u, const float* weight, const Grid& grid, float& cost) {
    CodeGrid<LOW> low;
    low.unit = kStretch;
    low.code_count = four_bit_step(grid);
    low.code_centre = 0.5f - low.code_count * 0.5f;
#pragma unroll
    for (int k = 0; k < LOW; k++) {
        low.step[k] = grid.step[kFirstLow + k] * kStretch;
        low.ratio[k] = grid.ratio[kFirstLow + k];
        low.cells[k] = grid.cells[kFirstLow + k] * 0.0625f;
        low.centre[k] = grid.centre[kFirstLow + k] - low.cells[k] * 0.5f;
    }
    const float nearest = nearest_cell(u[WIDTHS - 1], low.code_count, 16.0f, 0.5f);
    float best = best_code_of_cell(nearest, u, weight, grid, low, cost);
    for (float direction = 1.0f; direction >= -1.0f; direction -= 2.0f)
        for (float cell = nearest + direction; cell >= 0.0f && cell <= 15.0f; cell += direction) {
            if (bound_from_cell(cell, direction, u, weight, grid) >= cost) break;
            float other;
            const float code = best_code_of_cell(cell, u, weight, grid, low, other);
            if (other >= cost) continue;
            best = code;
            cost = other;
        }
    return best;
}
#endif

// Code with the least cost, by exhaustive search. Ties go to the code nearest to the highest bit-width's target.
DEVICE float best_code_exhaustive(const float* u, const float* weight, const Grid& grid, float& cost) {
    constexpr int top = WIDTHS - 1;
    float best = 0.0f;
    cost = __int_as_float(0x7F800000); // infinity
    for (float q = 0.0f; q < grid.code_count; q += 1.0f) {
        float other = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            float error = u[k] - dequantize_code(q, grid, k);
            other += weight[k] * error * error;
        }
        bool closer = fabsf(u[top] - (q + grid.code_centre)) < fabsf(u[top] - (best + grid.code_centre));
        if (other < cost || (other == cost && closer)) {
            best = q;
            cost = other;
        }
    }
    return best;
}

DEVICE float best_code(const float* u, const float* weight, const Grid& grid, float& cost) {
#if LOW
    return best_code_stretched(u, weight, grid, cost);
#endif
    return NESTED ? best_code_nested<WIDTHS>(u, weight, grid, cost) : best_code_exhaustive(u, weight, grid, cost);
}

// ---- scales

// Scale rounded to its stored dtype. Double rounding by way of float32 differs from direct rounding only where the first rounding creates
// a tie, about once in 2^29 scales of 16 bits.
DEVICE float round_scale(double scale) {
    float f = (float)scale;
#if SCALES == 1
    return half_to_float(float_to_half(f));
#elif SCALES == 2
    return bfloat_to_float(float_to_bfloat(f));
#else
    return f;
#endif
}

// Scale at which the values of the highest bit-width cover low..high times `clip`. zero: zero point; NaN is replaced by the integer that
// fits the range best.
DEVICE float scale_from_range(float low, float high, float clip, const Grid& grid, float& zero) {
    const float step = grid.step[WIDTHS - 1], size = four_bit_step(grid);
    const float span = LOW ? grid.code_count - size + kStretch * (size - step) : grid.code_count - step;
    const float least = LOW ? (grid.code_count - span) * 0.5f : step * grid.code_centre;
    double middle = grid.code_count * 0.5;
    if (zero == zero) {
        double below = span * 0.5 + (zero - middle), above = span * 0.5 - (zero - middle);
        return round_scale(fmax(-low / below, high / above) * clip);
    }
    float scale = round_scale((high - low) * clip / span);
    zero = (float)middle;
    if (scale != 0.0f) zero = fminf(fmaxf(rintf(least - low * clip / scale), 0.0f), grid.code_count - 1.0f);
    return scale;
}

// Per row the scale and zero point with the least weighted squared error over columns first .. last - 1.
//
// targets [T, rows, columns], hessian_diag [columns], lambdas [K, columns], clip_ratios [clip_count], zero_points [point_count];
// out: scales [rows], zeros [rows].
KERNEL void choose_scales(const float* targets, const float* hessian_diag, const float* lambdas, const float* cells, int code_count,
                          float centre, const float* clip_ratios, int clip_count, const float* zero_points, int point_count,
                          int rows, int columns, int first, int last, float* scales, float* zeros) {
    const int row = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    if (row >= rows) return;
    const Grid grid = load_code_grid(cells, code_count, centre);
    const size_t plane = (size_t)rows * columns;
    const float* row_targets = targets + (size_t)row * columns;
    const float* top = row_targets + (TARGETS - 1) * plane;

    float low = 0.0f, high = 0.0f;
    for (int j = first + lane; j < last; j += kLanes) {
        low = fminf(low, top[j]);
        high = fmaxf(high, top[j]);
    }
    for (int by = 16; by > 0; by /= 2) {
        low = fminf(low, __shfl_xor_sync(kAllLanes, low, by));
        high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, by));
    }

    // Coarse pass over every fourth clip ratio and all zero points, then refinement at distance two and one around the best.
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
        const float scale = scale_from_range(low, high, clip_ratios[clip], grid, zero);
        if (scale == 0.0f) continue;
        const float inverse = 1.0f / scale;
        float total = 0.0f;
        for (int j = first + lane; j < last; j += kLanes) {
            float u[WIDTHS], weight[WIDTHS], cost;
#pragma unroll
            for (int k = 0; k < WIDTHS; k++) {
                u[k] = row_targets[(TARGETS == 1 ? 0 : k) * plane + j] * inverse + zero;
                weight[k] = lambdas[(size_t)k * columns + j] * hessian_diag[j];
            }
            best_code(u, weight, grid, cost);
            total += cost;
        }
        for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(kAllLanes, total, by);
        total = total * scale * scale;
        if (total < best) {
            best = total;
            best_clip = clip;
            best_point = point;
        }
    }
    if (lane == 0) {
        float zero = zero_points[best_point];
        scales[row] = scale_from_range(low, high, clip_ratios[best_clip], grid, zero);
        zeros[row] = zero;
    }
}

// ---- codes

// Scales of one row at each bit-width. An error in units of the scale weighs the square of its ratio to the highest bit-width's.
struct RowScales {
    float scale[WIDTHS], inverse[WIDTHS], squared_ratio[WIDTHS];
};

// scales [K, rows]; 0 beyond the last row.
DEVICE RowScales load_row_scales(const float* scales, int rows, int row) {
    RowScales of_row;
    const float top = row < rows ? scales[(size_t)(WIDTHS - 1) * rows + row] : 0.0f;
#pragma unroll
    for (int k = 0; k < WIDTHS; k++) {
        const float scale = row < rows ? scales[(size_t)k * rows + row] : 0.0f;
        const float ratio = top != 0.0f ? scale / top : 1.0f;
        of_row.scale[k] = scale;
        of_row.inverse[k] = scale != 0.0f ? 1.0f / scale : 0.0f;
        of_row.squared_ratio[k] = ratio * ratio;
    }
    return of_row;
}

// Load the block's rows and `width` columns from [count, rows, columns] to shared memory [count, width, lane]; 0 beyond the last row.
DEVICE void load_columns(float* tile, const float* matrix, int count, int rows, int columns, int first, int width) {
    const int begin = blockIdx.x * kLanes, lane = threadIdx.x;
    for (int k = 0; k < count; k++)
        for (int r = 0; r < kLanes; r++)
            for (int i = lane; i < width; i += kLanes) {
                const size_t row = (size_t)k * rows + begin + r;
                tile[(k * width + i) * kStride + r] = begin + r < rows ? matrix[row * columns + first + i] : 0.0f;
            }
    __syncwarp();
}

// Error feedback: add amount * coupling[j] to every later column j of this lane's row.
DEVICE void feed_back(float* tile, float amount, const float* coupling, int i, int width) {
    const int lane = threadIdx.x;
#pragma unroll 8
    for (int j = i + 1; j < width; j++) tile[j * kStride + lane] += amount * __ldg(coupling + j);
}

// GPTQ over columns first .. first + width - 1: choose a code, feed each target's error back to the later columns.
//
// targets [T, rows, columns], factor [F, width, width] (upper Cholesky factor of the inverse Hessian), lambdas [K, columns],
// scales [K, rows], zeros [rows]; out: codes [rows, columns], errors [T, width, rows].
KERNEL void solve_columns(const float* targets, const float* factor, const float* lambdas, const float* cells, int code_count,
                          float centre, int rows, int columns, int first, int width, const float* scales,
                          const float* zeros, u8* codes, float* errors) {
    SHARED_MEMORY(shared);
    float* tile = (float*)shared;
    load_columns(tile, targets, TARGETS, rows, columns, first, width);
    const Grid grid = load_code_grid(cells, code_count, centre);
    const int lane = threadIdx.x, row = blockIdx.x * kLanes + lane;
    const bool in_range = row < rows;
    const float zero = in_range ? zeros[row] : 0.0f;
    const RowScales scale = load_row_scales(scales, rows, row);
    for (int i = 0; i < width; i++) {
        float u[WIDTHS], weight[WIDTHS], cost;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            u[k] = tile[((TARGETS == 1 ? 0 : k) * width + i) * kStride + lane] * scale.inverse[k] + zero;
            weight[k] = __ldg(lambdas + (size_t)k * columns + first + i) * scale.squared_ratio[k];
        }
        const float q = best_code(u, weight, grid, cost);
        if (in_range) codes[(size_t)row * columns + first + i] = (u8)q;
        // A shared target receives the unweighted mean of all bit-widths' errors, as in MatGPTQ v1.
        const float part = TARGETS == 1 ? 1.0f / WIDTHS : 1.0f;
        float error[TARGETS] = {};
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float* diagonal = factor + (size_t)(FACTORS == 1 ? 0 : k) * width * width + i * width + i;
            error[TARGETS == 1 ? 0 : k] += (u[k] - dequantize_code(q, grid, k)) * scale.scale[k] * (part / __ldg(diagonal));
        }
#pragma unroll
        for (int k = 0; k < TARGETS; k++) {
            if (in_range) errors[((size_t)k * width + i) * rows + row] = error[k];
            const float* coupling = factor + ((size_t)(FACTORS == 1 ? 0 : k) * width + i) * width;
            feed_back(tile + k * width * kStride, -error[k], coupling, i, width);
        }
    }
}

// One coordinate-descent pass over columns first .. first + width - 1.
//
// gradient [K, rows, columns], hessian [F, width, width], lambdas [K, columns], scales [K, rows]; in and out: codes
// [rows, columns]; out: changes of the dequantized weights [K, width, rows].
KERNEL void descend_columns(const float* gradient, const float* hessian, const float* lambdas, const float* cells, int code_count,
                          float centre, int rows, int columns, int first, int width, const float* scales,
                          u8* codes, float* changes) {
    SHARED_MEMORY(shared);
    float* tile = (float*)shared;
    load_columns(tile, gradient, WIDTHS, rows, columns, first, width);
    const Grid grid = load_code_grid(cells, code_count, centre);
    const int lane = threadIdx.x, row = blockIdx.x * kLanes + lane;
    const bool in_range = row < rows;
    const RowScales scale = load_row_scales(scales, rows, row);
    for (int i = 0; i < width; i++) {
        float u[WIDTHS], weight[WIDTHS], cost;
        const size_t index = (size_t)row * columns + first + i;
        const float old = in_range ? (float)codes[index] : 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float* diagonal = hessian + (size_t)(FACTORS == 1 ? 0 : k) * width * width + i * width + i;
            const float slope = tile[(k * width + i) * kStride + lane];
            u[k] = dequantize_code(old, grid, k) - slope * scale.inverse[k] * (1.0f / __ldg(diagonal));
            weight[k] = __ldg(lambdas + (size_t)k * columns + first + i) * scale.squared_ratio[k];
        }
        const float q = best_code(u, weight, grid, cost);
        if (in_range) codes[index] = (u8)q;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {
            const float change = (dequantize_code(q, grid, k) - dequantize_code(old, grid, k)) * scale.scale[k];
            if (in_range) changes[((size_t)k * width + i) * rows + row] = change;
            const float* coupling = hessian + ((size_t)(FACTORS == 1 ? 0 : k) * width + i) * width;
            if (__any_sync(kAllLanes, change != 0.0f)) feed_back(tile + k * width * kStride, change, coupling, i, width);
        }
    }
}
