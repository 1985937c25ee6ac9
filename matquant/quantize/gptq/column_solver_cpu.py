"""Column solver on the CPU: columns one after the other, rows in parallel. No row depends on another one.

Compiled with numba. Throughout, K is the number of bit-widths in the objective (ascending, each with a weight above zero), T
the number of compensated targets (K, or 1 when all bit-widths share one), and

    cells     float32 [4, K]         per bit-width: codes in one of its cells (``step``), its cells in one cell of the bit-width
                                     before, its cells, and ``centre``, 1/2 for msb slices and 0 for round ones
    low_cells float32 [4, L]         the same for the bit-widths above four, within one cell of four bits and relative to its
                                     centre, if later planes are stretched; ``step`` is then stretched. Else L = 0
    lambdas   float32 [K, columns]   weight of the squared error of each bit-width in each column

A code q of M bits lies in the cell floor(q / step + 1/2 - centre) of a bit-width, with the value scale (step (cell + centre) -
zero). A target divided by the scale, plus the zero point, is in units of a code; it is called u. With a stretch t, the value of
the last L bit-widths is farther by t from the centre of the code's cell of four bits.

Choice of a code. Cells of msb slices nest: a cell of one bit-width holds r whole cells of the next. Let g_k(c) be the least
cost of the bit-widths k and above among the codes of a cell c of bit-width k,

    g_k(c) = lambda_k (u_k - value_k(c))^2 + min over the cells c' in c of g_(k+1)(c')

The minimum of a convex function over consecutive intervals is convex in the interval, so every g_k is convex. Hence its least
cell m_k lies between the cell nearest to u_k and the cell that holds m_(k+1), and its least cell within a range is m_k clipped
to that range. That gives the best of all 2^M codes after a few evaluations. Round slices do not nest (except for a single
bit-width of M bits): for them all codes are tried.

With a stretch the same holds within a cell of four bits, for the last L bit-widths and targets relative to its centre.
The cells of four bits are tried from the one nearest to the highest bit-width's target on, in both directions. For a cell above
it, and all cells further up, the cost is at least

    sum_k lambda_k max(0, least value of the cell at bit-width k - u_k)^2

and likewise downwards. So a direction ends at the first cell where this bound is not below the least cost found.

Rows (in the scale search: columns) are processed _LANES at a time, in loops that compile to vector instructions. All
arithmetic is float32 without reassociation, so a choice never depends on the number of threads. All compiled functions stay in
one file, since numba's cache does not notice changes in other files.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

_F32 = np.float32

_LANES = 64
_PART = 16  # columns after which errors are fed back to the rest of the block


class SolverGrid(NamedTuple):
    """Values of ``CodeGrid`` for compiled functions; ``code_grid`` describes them.

    numba's cache on disk refers to this class by name: renaming it breaks caches that exist.
    """

    cells: NDArray[np.float32]
    low_cells: NDArray[np.float32]
    codes: int
    centre: np.float32
    nested: bool
    stretch: np.float32


# Choosing codes


@numba.njit(cache=True)
def scratch_rows(n_bits: int) -> int:
    """Rows of ``_LANES`` floats that ``best_codes`` needs as scratch for so many bit-widths."""
    return 2 * n_bits + 10


@numba.njit(cache=True)
def best_codes(u, weight, grid, scratch, codes, cost):
    """Find for each lane the code of least sum_k weight_k (u_k - value_k(q))^2 among all codes.

    Among codes that are equal at every bit-width of the objective, the one whose own value is nearest to the target of the
    highest bit-width is taken, so that bits outside of the objective still follow the weight.

    Args:
        u, weight: float32 [K, _LANES].
        grid: a ``SolverGrid``.
        scratch: float32 [scratch_rows(K), _LANES].
        codes, cost: float32 [_LANES], out; the cost is in units of a code squared.
    """
    if grid.low_cells.shape[1]:
        _search_stretched(u, weight, grid, scratch, codes, cost)
    elif grid.nested:
        _least_cells(u, weight, grid.cells, scratch, cost)
        _descend(u, grid.cells, _F32(1), _F32(grid.codes), grid.centre, scratch, codes)
    else:
        _try_all(u, weight, grid, scratch, codes, cost)


@numba.njit(cache=True)
def _least_cells(u, weight, cells, scratch, cost):
    """Write m_k of all bit-widths to the first K rows of ``scratch``, and g_0(m_0) to ``cost``."""
    n_bits = u.shape[0]
    cell, toward, other, nearest, inner = (
        scratch[n_bits],
        scratch[n_bits + 1],
        scratch[n_bits + 2],
        scratch[n_bits + 3],
        scratch[n_bits + 4],
    )
    _nearest_cells(u[n_bits - 1], cells[0, n_bits - 1], cells[2, n_bits - 1], cells[3, n_bits - 1], scratch[n_bits - 1])
    _cost_within(n_bits - 1, scratch[n_bits - 1], u, weight, cells, scratch, inner, cost)
    for k in range(n_bits - 2, -1, -1):
        _nearest_cells(u[k], cells[0, k], cells[2, k], cells[3, k], nearest)
        least, above, share = scratch[k], scratch[k + 1], _F32(1) / cells[1, k + 1]
        for r in range(_LANES):
            least[r] = np.floor(above[r] * share)
        for r in range(_LANES):
            step = nearest[r] - least[r]
            step = step if step < _F32(1) else _F32(1)
            toward[r] = step if step > _F32(-1) else _F32(-1)
        _cost_within(k, least, u, weight, cells, scratch, inner, cost)
        while True:
            going = 0
            for r in range(_LANES):
                going += toward[r] != _F32(0)
            if going == 0:
                break
            for r in range(_LANES):
                cell[r] = least[r] + toward[r]
            _cost_within(k, cell, u, weight, cells, scratch, inner, other)
            # One store per loop: with more, the compiler cannot prove that all pairs of arrays are distinct.
            for r in range(_LANES):
                least[r] = cell[r] if other[r] < cost[r] else least[r]
            for r in range(_LANES):
                toward[r] = toward[r] if (other[r] < cost[r]) & (cell[r] != nearest[r]) else _F32(0)
            for r in range(_LANES):
                cost[r] = other[r] if other[r] < cost[r] else cost[r]


@numba.njit(cache=True)
def _cost_within(k, cell, u, weight, cells, least, inner, cost):
    """Write g_k(cell) to ``cost``; ``least`` holds m of all higher bit-widths, ``inner`` is scratch."""
    target, lambdas, step, centre = u[k], weight[k], cells[0, k], cells[3, k]
    for r in range(_LANES):
        error = target[r] - step * (cell[r] + centre)
        cost[r] = lambdas[r] * error * error
    outer = cell
    for j in range(k + 1, u.shape[0]):
        target, lambdas, step, centre = u[j], weight[j], cells[0, j], cells[3, j]
        _clip_to_cells(least[j], outer, cells[1, j], inner)
        for r in range(_LANES):
            error = target[r] - step * (inner[r] + centre)
            cost[r] += lambdas[r] * error * error
        outer = inner


@numba.njit(cache=True)
def _descend(u, cells, unit, codes_in_all, centre, least, codes):
    """Write the best codes, given m_k of all bit-widths.

    Args:
        unit: distance of the values of neighbouring codes; ``centre`` is that of these values.
    """
    n_bits = u.shape[0]
    cell, nearest = least[n_bits], least[n_bits + 1]
    cell[:] = least[0]
    for k in range(1, n_bits):
        _clip_to_cells(least[k], cell, cells[1, k], codes)
        cell[:] = codes
    _nearest_cells(u[n_bits - 1], unit, codes_in_all, centre, nearest)
    _clip_to_cells(nearest, cell, cells[0, n_bits - 1] / unit, codes)


@numba.njit(cache=True)
def _nearest_cells(u, step, cells, centre, out):
    """Write the cells of ``step`` codes with the value nearest to u."""
    share, shift, last = _F32(1) / step, _F32(0.5) - centre, cells - _F32(1)
    for r in range(_LANES):
        cell = np.floor(u[r] * share + shift)
        cell = cell if cell > _F32(0) else _F32(0)
        out[r] = cell if cell < last else last


@numba.njit(cache=True)
def _clip_to_cells(inner, outer, ratio, out):
    """Clip ``inner`` to the ``ratio`` cells of the higher bit-width that each outer cell holds."""
    span = ratio - _F32(1)
    for r in range(_LANES):
        first = outer[r] * ratio
        cell = inner[r] if inner[r] > first else first
        out[r] = cell if cell < first + span else first + span


@numba.njit(cache=True)
def _search_stretched(u, weight, grid, scratch, codes, cost):
    """Find the best codes where later planes are stretched: try cells of four bits, see above."""
    n_low = grid.low_cells.shape[1]
    nearest, cell, trial, trial_codes, ended = scratch[:5]
    low_u, rest = scratch[5 : 5 + n_low], scratch[5 + n_low :]
    _nearest_cells(u[u.shape[0] - 1], _four_bit_step(grid), _F32(16), _F32(0.5), nearest)
    _cost_of_cell(nearest, u, weight, grid, low_u, rest, codes, cost)
    for direction in (_F32(1), _F32(-1)):
        cell[:] = nearest
        ended[:] = _F32(0)  # infinity for lanes whose search has ended
        while True:
            for r in range(_LANES):
                cell[r] += direction
            _bound_from_cell(cell, direction, u, weight, grid, trial)
            going = 0
            for r in range(_LANES):
                outside = (cell[r] < _F32(0)) | (cell[r] > _F32(15)) | (trial[r] >= cost[r])
                ended[r] = _F32(np.inf) if outside else ended[r]
                going += ended[r] == _F32(0)
            if going == 0:
                break
            _cost_of_cell(cell, u, weight, grid, low_u, rest, trial_codes, trial)
            for r in range(_LANES):
                trial[r] += ended[r]
            for r in range(_LANES):
                codes[r] = trial_codes[r] if trial[r] < cost[r] else codes[r]
            for r in range(_LANES):
                cost[r] = trial[r] if trial[r] < cost[r] else cost[r]


@numba.njit(cache=True)
def _cost_of_cell(cell, u, weight, grid, low_u, scratch, codes, cost):
    """Write the best codes within a cell of four bits, and their cost."""
    n_low, size = grid.low_cells.shape[1], _four_bit_step(grid)
    first = u.shape[0] - n_low
    for k in range(n_low):
        target, out = u[first + k], low_u[k]
        for r in range(_LANES):
            out[r] = target[r] - size * (cell[r] + _F32(0.5))
    _least_cells(low_u, weight[first:], grid.low_cells, scratch, cost)
    _descend(low_u, grid.low_cells, grid.stretch, size, _F32(0.5) - size * _F32(0.5), scratch, codes)
    for r in range(_LANES):
        codes[r] += cell[r] * size
    for k in range(first):
        target, lambdas, step = u[k], weight[k], grid.cells[0, k]
        for r in range(_LANES):
            error = target[r] - step * (np.floor(cell[r] * (size / step)) + _F32(0.5))
            cost[r] += lambdas[r] * error * error


@numba.njit(cache=True)
def _bound_from_cell(cell, direction, u, weight, grid, bound):
    """Write a lower bound of the cost of all codes within a cell of four bits, or further in its direction."""
    first, size = u.shape[0] - grid.low_cells.shape[1], _four_bit_step(grid)
    bound[:] = _F32(0)
    for k in range(u.shape[0]):
        target, lambdas, step = u[k], weight[k], grid.cells[0, k]
        length = size if k >= first else step  # of the cell whose middle is compared
        reach = grid.stretch * (size - step) * _F32(0.5) if k >= first else _F32(0)
        for r in range(_LANES):
            middle = length * (np.floor(cell[r] * (size / length)) + _F32(0.5))
            beyond = direction * (middle - target[r]) - reach
            beyond = beyond if beyond > _F32(0) else _F32(0)
            bound[r] += lambdas[r] * beyond * beyond


@numba.njit(cache=True)
def _try_all(u, weight, grid, scratch, codes, cost):
    """Find the best codes by brute force."""
    n_bits = u.shape[0]
    other, least = scratch[0], scratch[1]
    top = u[n_bits - 1]
    cost[:] = _F32(np.inf)
    codes[:] = _F32(0)
    for q in range(grid.codes):
        other[:] = _F32(0)
        for k in range(n_bits):
            target, lambdas, value = u[k], weight[k], _strict_value(_F32(q), k, grid)
            for r in range(_LANES):
                error = target[r] - value
                other[r] += lambdas[r] * error * error
        own = _F32(q) + grid.centre
        for r in range(_LANES):
            closer = (other[r] == cost[r]) & (abs(top[r] - own) < abs(top[r] - (codes[r] + grid.centre)))
            least[r] = _F32(q) if (other[r] < cost[r]) | closer else codes[r]
        codes[:] = least
        for r in range(_LANES):
            cost[r] = other[r] if other[r] < cost[r] else cost[r]


@numba.njit(cache=True)
def _value(code, k, grid):
    """Value of a code at the k-th bit-width, in units of a code."""
    value = _strict_value(code, k, grid)
    if k < grid.cells.shape[1] - grid.low_cells.shape[1]:
        return value
    size = _four_bit_step(grid)
    middle = size * (np.floor(code / size) + _F32(0.5))
    return middle + grid.stretch * (value - middle)


@numba.njit(cache=True)
def _strict_value(code, k, grid):
    """Value of a code at the k-th bit-width without a stretch."""
    step, cells = grid.cells[0, k], grid.cells[2, k]
    cell = np.floor(code / step + (_F32(0.5) - grid.centre))
    return step * ((cell if cell < cells - _F32(1) else cells - _F32(1)) + grid.centre)


@numba.njit(cache=True)
def _four_bit_step(grid):
    """Codes of a cell of four bits."""
    return _F32(grid.codes) / _F32(16)


# Choosing scales


@numba.njit(cache=True)
def round_scale(value, mantissa_bits, min_exponent):
    """Round ``value`` (not negative) to a float with ``mantissa_bits`` mantissa bits, subnormals below 2^min_exponent."""
    if value == 0:
        return _F32(0)
    exponent = max(math.frexp(value)[1] - 1, min_exponent)
    step = math.ldexp(1.0, exponent - mantissa_bits)
    return _F32(np.rint(value / step) * step)


@numba.njit(cache=True)
def _value_range(grid):
    """Least value of the highest bit-width of the objective, and the distance of the greatest one from it."""
    step, codes, size = grid.cells[0, grid.cells.shape[1] - 1], _F32(grid.codes), _four_bit_step(grid)
    if grid.low_cells.shape[1] == 0:
        return step * grid.centre, codes - step
    span = codes - size + grid.stretch * (size - step)
    return (codes - span) * _F32(0.5), span


@numba.njit(cache=True)
def _range_grid(low, high, clip, zero, least, span, master_codes, mantissa_bits, min_exponent):
    """Scale and zero point at which values from ``least`` on cover the clipped range low..high.

    The zero point is ``zero``; for NaN it is the whole number that fits the range best.
    """
    middle = master_codes // 2
    if not math.isnan(zero):
        below, above = span / 2 + (zero - middle), span / 2 - (zero - middle)
        return round_scale(max(-low / below, high / above) * clip, mantissa_bits, min_exponent), zero
    scale = round_scale((high - low) * clip / span, mantissa_bits, min_exponent)
    if scale == 0:
        return scale, _F32(middle)
    # The lowest value lands on the lower end.
    return scale, _F32(min(max(np.rint(least - low * clip / scale), 0.0), master_codes - 1.0))


@numba.njit(cache=True)
def _rounding_cost(targets, row, first, last, scale, zero, hessian_diag, lambdas, grid, most, work):
    """Nested rounding error of the columns first..last of one row, weighted by ``hessian_diag``.

    Args:
        most: bound above which the sum is cut short.
        work: float32 [2 K + scratch_rows(K) + 2, _LANES], scratch.
    """
    if scale == 0:
        return _F32(np.inf)
    n_bits, shared = lambdas.shape[0], targets.shape[0] == 1
    u, weight, scratch = work[:n_bits], work[n_bits : 2 * n_bits], work[2 * n_bits : -2]
    codes, cost = work[-2], work[-1]
    inverse, total = _F32(1) / scale, _F32(0)
    for begin in range(first, last, _LANES):
        count = min(_LANES, last - begin)
        for k in range(n_bits):
            target, lambda_k = (
                targets[0 if shared else k, row, begin : begin + count],
                lambdas[k, begin : begin + count],
            )
            for r in range(count):
                u[k, r] = target[r] * inverse + zero
            for r in range(count):
                weight[k, r] = lambda_k[r] * hessian_diag[begin + r]
            weight[k, count:] = _F32(0)
        best_codes(u, weight, grid, scratch, codes, cost)
        for r in range(count):
            total += cost[r]
        if total * scale * scale > most:
            break
    return total * scale * scale


@numba.njit(parallel=True, cache=True)
def choose_scales(
    targets,
    first,
    last,
    hessian_diag,
    lambdas,
    grid,
    clip_ratios,
    zero_points,
    mantissa_bits,
    min_exponent,
    scales,
    zeros,
):
    """Scale and zero point of every row for the group of columns first..last.

    Tries clip ratios of the group's range with each zero point (NaN: the one that follows from the range) and keeps the pair
    of least nested rounding error, weighted by ``hessian_diag`` (float32 [columns]): every fourth clip ratio first, then those
    two and one steps beside the best. A single clip ratio and zero point give plain min-max.

    Args:
        targets: float32 [T, rows, columns], error-compensated so far.
        scales, zeros: float32 [rows], out.
    """
    n_bits, count, points = lambdas.shape[0], clip_ratios.shape[0], zero_points.shape[0]
    codes = _F32(grid.codes)
    least, span = _value_range(grid)
    coarse = (count + 3) // 4
    trials = coarse * points + 4 if count * points > 1 else 0
    for row in numba.prange(targets.shape[1]):
        work = _work(n_bits)
        low, high = _F32(0), _F32(0)
        top = targets[targets.shape[0] - 1, row]
        for j in range(first, last):
            low, high = min(low, top[j]), max(high, top[j])
        best, best_clip, best_point, around = _F32(np.inf), 0, 0, 0
        for trial in range(trials):
            fine = trial - coarse * points
            if fine < 0:
                point, clip = trial // coarse, trial % coarse * 4
            else:
                around = best_clip if fine % 2 == 0 else around
                point, clip = best_point, around + (2 - fine // 2) * (1 if fine % 2 else -1)
                if clip < 0 or clip >= count:
                    continue
            scale, zero = _range_grid(
                low, high, clip_ratios[clip], zero_points[point], least, span, codes, mantissa_bits, min_exponent
            )
            cost = _rounding_cost(targets, row, first, last, scale, zero, hessian_diag, lambdas, grid, best, work)
            if cost < best:
                best, best_clip, best_point = cost, clip, point
        scales[row], zeros[row] = _range_grid(
            low, high, clip_ratios[best_clip], zero_points[best_point], least, span, codes, mantissa_bits, min_exponent
        )


# Choosing the codes of many columns


@numba.njit(cache=True)
def _work(n_bits):
    """Scratch of a tile: targets and weights [K, _LANES] each, that of ``best_codes``, codes, and costs."""
    return np.zeros((2 * n_bits + scratch_rows(n_bits) + 2, _LANES), dtype=np.float32)


@numba.njit(parallel=True, cache=True)
def solve_columns(targets, factor, lambdas, grid, first, last, scales, zeros, codes, errors):
    """Choose the codes of the columns first..last of every row, and feed each column's error into the later ones.

    Args:
        targets: float32 [T, rows, columns].
        factor: float32 [F, last - first, last - first], the block of each inverse Hessian's upper Cholesky factor.
        scales: float32 [K, rows], of the group in which these columns lie.
        zeros: float32 [rows], of that group.
        codes: uint8 [rows, columns], out.
        errors: float32 [T, rows, last - first], out: each target's error over the factor's diagonal.
    """
    count, n_bits, factors, columns = targets.shape[0], lambdas.shape[0], factor.shape[0], last - first
    for tile in numba.prange(_tiles(targets.shape[1])):
        begin = tile * _LANES
        end = min(begin + _LANES, targets.shape[1])
        block = np.zeros((count, columns, _LANES), dtype=np.float32)
        error = np.zeros((count, columns, _LANES), dtype=np.float32)
        work = _work(n_bits)
        scale, inverse, ratio = _lanes_of(scales, begin, end)
        zero = np.zeros(_LANES, dtype=np.float32)
        zero[: end - begin] = zeros[begin:end]
        _transpose(targets[:, begin:end, first:last], block)
        u, weight, scratch, q = work[:n_bits], work[n_bits : 2 * n_bits], work[2 * n_bits : -2], work[-2]
        for i in range(columns):
            for k in range(n_bits):
                target, out = block[0 if count == 1 else k, i], u[k]
                for r in range(_LANES):
                    out[r] = target[r] * inverse[k, r] + zero[r]
                    weight[k, r] = lambdas[k, first + i] * ratio[k, r]
            best_codes(u, weight, grid, scratch, q, work[-1])
            for r in range(end - begin):
                codes[begin + r, first + i] = np.uint8(q[r])
            # A shared target gets the mean error of the bit-widths, as in MatGPTQ v1.
            part = _F32(1) / n_bits if count == 1 else _F32(1)
            for k in range(n_bits):
                out, target = error[0 if count == 1 else k, i], u[k]
                share = part / factor[0 if factors == 1 else k, i, i]
                for r in range(_LANES):
                    residual = target[r] - _value(q[r], k, grid)
                    out[r] += residual * scale[k, r] * share
            _feed_back(block, error, factor, i, columns)
        for k in range(count):
            for r in range(end - begin):
                for i in range(columns):
                    errors[k, begin + r, i] = error[k, i, r]


@numba.njit(cache=True)
def _feed_back(block, error, factor, i, columns):
    """Subtract the error of column i from the later columns of its part.

    At the end of a part, the error of the whole part is subtracted from all later columns.
    """
    part = i // _PART * _PART
    whole = i + 1 == part + _PART
    for k in range(block.shape[0]):
        coupling = factor[0 if factor.shape[0] == 1 else k]
        if not whole:
            for j in range(i + 1, min(part + _PART, columns)):
                _subtract(block[k, j], error[k, i], coupling[i, j])
            continue
        for j in range(i + 1, columns):
            later = block[k, j]
            for g in range(part, i + 1, 4):
                _subtract_four(later, error[k], coupling, g, j)


@numba.njit(cache=True)
def _subtract(later, error, coupling):
    for r in range(_LANES):
        later[r] -= error[r] * coupling


@numba.njit(cache=True)
def _subtract_four(later, error, coupling, i, j):
    e0, e1, e2, e3 = error[i], error[i + 1], error[i + 2], error[i + 3]
    c0, c1, c2, c3 = coupling[i, j], coupling[i + 1, j], coupling[i + 2, j], coupling[i + 3, j]
    for r in range(_LANES):
        later[r] -= e0[r] * c0 + e1[r] * c1 + e2[r] * c2 + e3[r] * c3


@numba.njit(parallel=True, cache=True)
def descend_columns(gradient, hessian, lambdas, grid, first, last, scales, codes, moves):
    """Run one pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Each weight in turn takes the best of all codes while the others stay fixed. In a column with curvature h, the error of a
    bit-width as a function of its value v is h (v - (w - g/h))^2 plus a constant, with the present value w and half the
    gradient g. So the best code is that of the targets w - g/h.

    Args:
        gradient: float32 [K, rows, columns], half the gradient.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
        scales: float32 [K, rows], of the group in which these columns lie.
        codes: uint8 [rows, columns], in and out.
        moves: float32 [K, rows, last - first], out: change of the value at each bit-width.
    """
    n_bits, hessians, columns = lambdas.shape[0], hessian.shape[0], last - first
    for tile in numba.prange(_tiles(codes.shape[0])):
        begin = tile * _LANES
        end = min(begin + _LANES, codes.shape[0])
        block = np.zeros((n_bits, columns, _LANES), dtype=np.float32)
        moved = np.zeros((n_bits, columns, _LANES), dtype=np.float32)
        work = _work(n_bits)
        old = np.zeros(_LANES, dtype=np.float32)
        scale, inverse, ratio = _lanes_of(scales, begin, end)
        _transpose(gradient[:, begin:end, first:last], block)
        u, weight, scratch, q = work[:n_bits], work[n_bits : 2 * n_bits], work[2 * n_bits : -2], work[-2]
        for i in range(columns):
            for r in range(end - begin):
                old[r] = _F32(codes[begin + r, first + i])
            for k in range(n_bits):
                slope, out, share = block[k, i], u[k], _F32(1) / hessian[0 if hessians == 1 else k, i, i]
                for r in range(_LANES):
                    value = _value(old[r], k, grid)
                    out[r] = value - slope[r] * inverse[k, r] * share
                    weight[k, r] = lambdas[k, first + i] * ratio[k, r]
            best_codes(u, weight, grid, scratch, q, work[-1])
            for r in range(end - begin):
                codes[begin + r, first + i] = np.uint8(q[r])
            for k in range(n_bits):
                move, any_move = moved[k, i], _F32(0)
                for r in range(_LANES):
                    now = _value(q[r], k, grid)
                    before = _value(old[r], k, grid)
                    move[r] = (now - before) * scale[k, r]
                for r in range(_LANES):
                    any_move = move[r] if move[r] != 0 else any_move
                if any_move != 0:
                    # Earlier columns are not visited again in this pass.
                    coupling = hessian[0 if hessians == 1 else k, i]
                    for j in range(i + 1, columns):
                        _subtract(block[k, j], move, -coupling[j])
        for k in range(n_bits):
            for r in range(end - begin):
                for i in range(columns):
                    moves[k, begin + r, i] = moved[k, i, r]


@numba.njit(cache=True)
def _tiles(rows):
    return (rows + _LANES - 1) // _LANES


@numba.njit(cache=True)
def _lanes_of(scales, begin, end):
    """Scale of each bit-width and lane, its inverse, and the square of its ratio to that of the highest bit-width.

    The square is what an error in units of the scale weighs. Scales are 0 in lanes without a row, as is the inverse of 0.
    """
    n_bits = scales.shape[0]
    out = np.zeros((3, n_bits, _LANES), dtype=np.float32)
    out[2] = _F32(1)
    for k in range(n_bits):
        for r in range(end - begin):
            scale, top = scales[k, begin + r], scales[n_bits - 1, begin + r]
            out[0, k, r] = scale
            if scale != 0:
                out[1, k, r] = _F32(1) / scale
            if top != 0:
                ratio = scale / top
                out[2, k, r] = ratio * ratio
    return out[0], out[1], out[2]


@numba.njit(cache=True)
def _transpose(matrix, out):
    """Transpose [k, rows, columns] to [k, columns, lanes]."""
    for k in range(matrix.shape[0]):
        for r in range(matrix.shape[1]):
            for j in range(matrix.shape[2]):
                out[k, j, r] = matrix[k, r, j]
