"""The row solver: what happens to one row of weights does not depend on any other row.

Compiled with numba, rows in parallel. Throughout, K is the number of widths in the objective (ascending, each with a weight
above zero), T the number of compensated targets (K, or 1 when all widths share one), and

    grid   float32 [3, K]          of each width: codes in one of its cells, how many of its cells lie in one of the width
                                   before, how many cells there are
    lam    float32 [K, columns]    weight of each width's squared error in each column

A code q of M bits lies in the cell floor(q / step + 1/2 - centre) of a width, whose value is scale (step (cell + centre) -
zero): ``centre`` is 1/2 for msb slices and 0 for round ones. Targets divided by the scale, plus the zero point, are in units
of a code; they are called u.

How a code is chosen. Cells of msb slices nest: one of a width holds r whole cells of the next. Let g_k(c) be the least cost
of the widths k and above among the codes of a cell c of width k,

    g_k(c) = lam_k (u_k - value_k(c))^2 + min over the cells c' in c of g_(k+1)(c')

The minimum of a convex function over consecutive intervals is convex in the interval, so every g_k is convex. Hence its
least cell m_k lies between the cell nearest to u_k and the one that holds m_(k+1), and its least cell within a range is m_k
clipped to that range. That finds the best of all 2^M codes after a look at a handful. Round slices do not nest (except for
a single width of M bits): for them all codes are tried.

Rows (in the scale search: columns) are taken side by side, _LANES at a time, in loops that become vector instructions. All
arithmetic is float32 without reassociation, so a choice never depends on the number of threads.
"""

import math

import numba
import numpy as np

_F32 = np.float32

_LANES = 64
_PART = 16  # columns after which errors are fed back to the rest of the block


# Choosing codes


@numba.njit(cache=True)
def best_codes(u, weight, grid, master_codes, centre, nested, scratch, codes, cost):
    """For each lane the code of least sum_k weight_k (u_k - value_k(q))^2 over all ``master_codes`` codes.

    Among codes that no width tells apart it is the one whose own value is nearest to the highest width's target: bits that
    no width of the objective sees still follow the weight.

    Args:
        u, weight: float32 [K, _LANES].
        nested: whether cells nest, see above.
        scratch: float32 [K + 5, _LANES].
        codes, cost: float32 [_LANES], out; the cost is in units of a code squared.
    """
    if nested:
        _least_cells(u, weight, grid, centre, scratch, cost)
        _descend(u, grid, master_codes, centre, scratch, codes)
    else:
        _try_all(u, weight, grid, master_codes, centre, scratch, codes, cost)


@numba.njit(cache=True)
def _least_cells(u, weight, grid, centre, scratch, cost):
    """The m_k of all widths, into the first K rows of ``scratch``, and g_0(m_0), into ``cost``."""
    widths = u.shape[0]
    cell, toward, other, nearest, inner = (
        scratch[widths],
        scratch[widths + 1],
        scratch[widths + 2],
        scratch[widths + 3],
        scratch[widths + 4],
    )
    _nearest_cells(u[widths - 1], grid[0, widths - 1], grid[2, widths - 1], centre, scratch[widths - 1])
    _cost_within(widths - 1, scratch[widths - 1], u, weight, grid, centre, scratch, inner, cost)
    for k in range(widths - 2, -1, -1):
        _nearest_cells(u[k], grid[0, k], grid[2, k], centre, nearest)
        least, above, share = scratch[k], scratch[k + 1], _F32(1) / grid[1, k + 1]
        for r in range(_LANES):
            least[r] = np.floor(above[r] * share)
        for r in range(_LANES):
            step = nearest[r] - least[r]
            step = step if step < _F32(1) else _F32(1)
            toward[r] = step if step > _F32(-1) else _F32(-1)
        _cost_within(k, least, u, weight, grid, centre, scratch, inner, cost)
        while True:
            going = 0
            for r in range(_LANES):
                going += toward[r] != _F32(0)
            if going == 0:
                break
            for r in range(_LANES):
                cell[r] = least[r] + toward[r]
            _cost_within(k, cell, u, weight, grid, centre, scratch, inner, other)
            # One store in each loop: with more, too many pairs of arrays would have to be proven apart.
            for r in range(_LANES):
                least[r] = cell[r] if other[r] < cost[r] else least[r]
            for r in range(_LANES):
                toward[r] = toward[r] if (other[r] < cost[r]) & (cell[r] != nearest[r]) else _F32(0)
            for r in range(_LANES):
                cost[r] = other[r] if other[r] < cost[r] else cost[r]


@numba.njit(cache=True)
def _cost_within(k, cell, u, weight, grid, centre, least, inner, cost):
    """g_k(cell), when ``least`` holds the m of all higher widths; ``inner`` is scratch."""
    target, lam, step = u[k], weight[k], grid[0, k]
    for r in range(_LANES):
        error = target[r] - step * (cell[r] + centre)
        cost[r] = lam[r] * error * error
    outer = cell
    for j in range(k + 1, u.shape[0]):
        target, lam, step = u[j], weight[j], grid[0, j]
        _clip_to_cells(least[j], outer, grid[1, j], inner)
        for r in range(_LANES):
            error = target[r] - step * (inner[r] + centre)
            cost[r] += lam[r] * error * error
        outer = inner


@numba.njit(cache=True)
def _descend(u, grid, master_codes, centre, least, codes):
    """The best codes, once the m_k are known."""
    widths = u.shape[0]
    cell, nearest = least[widths], least[widths + 1]
    cell[:] = least[0]
    for k in range(1, widths):
        _clip_to_cells(least[k], cell, grid[1, k], codes)
        cell[:] = codes
    _nearest_cells(u[widths - 1], _F32(1), _F32(master_codes), centre, nearest)
    _clip_to_cells(nearest, cell, grid[0, widths - 1], codes)


@numba.njit(cache=True)
def _nearest_cells(u, step, cells, centre, out):
    """The cells of ``step`` codes whose values are nearest to u."""
    share, shift, last = _F32(1) / step, _F32(0.5) - centre, cells - _F32(1)
    for r in range(_LANES):
        cell = np.floor(u[r] * share + shift)
        cell = cell if cell > _F32(0) else _F32(0)
        out[r] = cell if cell < last else last


@numba.njit(cache=True)
def _clip_to_cells(inner, outer, ratio, out):
    """Of the ``ratio`` cells of a higher width that each outer cell holds, the nearest to ``inner``."""
    span = ratio - _F32(1)
    for r in range(_LANES):
        first = outer[r] * ratio
        cell = inner[r] if inner[r] > first else first
        out[r] = cell if cell < first + span else first + span


@numba.njit(cache=True)
def _try_all(u, weight, grid, master_codes, centre, scratch, codes, cost):
    """``best_codes`` by trying all."""
    widths = u.shape[0]
    other, least = scratch[0], scratch[1]
    top = u[widths - 1]
    cost[:] = _F32(np.inf)
    codes[:] = _F32(0)
    for q in range(master_codes):
        other[:] = _F32(0)
        for k in range(widths):
            target, lam, value = u[k], weight[k], _value(_F32(q), grid[0, k], grid[2, k], centre)
            for r in range(_LANES):
                error = target[r] - value
                other[r] += lam[r] * error * error
        own = _F32(q) + centre
        for r in range(_LANES):
            closer = (other[r] == cost[r]) & (abs(top[r] - own) < abs(top[r] - (codes[r] + centre)))
            least[r] = _F32(q) if (other[r] < cost[r]) | closer else codes[r]
        codes[:] = least
        for r in range(_LANES):
            cost[r] = other[r] if other[r] < cost[r] else cost[r]


@numba.njit(cache=True)
def _value(code, step, cells, centre):
    """What a code decodes to at one width, in units of a code."""
    cell = np.floor(code / step + (_F32(0.5) - centre))
    return step * ((cell if cell < cells - _F32(1) else cells - _F32(1)) + centre)


# Choosing scales


@numba.njit(cache=True)
def round_scale(value, mantissa_bits, min_exponent):
    """``value`` (not negative) rounded to a float with that many mantissa bits, subnormals below 2^min_exponent."""
    if value == 0:
        return _F32(0)
    exponent = max(math.frexp(value)[1] - 1, min_exponent)
    step = math.ldexp(1.0, exponent - mantissa_bits)
    return _F32(np.rint(value / step) * step)


@numba.njit(cache=True)
def _range_grid(low, high, clip, zero, step, master_codes, centre, mantissa_bits, min_exponent):
    """Scale and zero point at which the values of the objective's highest width cover the clipped range low..high.

    About a given zero point; with NaN about the whole number that fits the range best.
    """
    span, middle = master_codes - step, master_codes // 2
    if not math.isnan(zero):
        below, above = span / 2 + (zero - middle), span / 2 - (zero - middle)
        return round_scale(max(-low / below, high / above) * clip, mantissa_bits, min_exponent), zero
    scale = round_scale((high - low) * clip / span, mantissa_bits, min_exponent)
    if scale == 0:
        return scale, _F32(middle)
    # The lowest value lands on the lower end.
    return scale, _F32(min(max(np.rint(step * centre - low * clip / scale), 0.0), master_codes - 1.0))


@numba.njit(cache=True)
def _rounding_cost(
    targets, row, first, last, scale, zero, importance, lam, grid, master_codes, centre, nested, most, work
):
    """Nested rounding error of the columns first..last of one row, weighted by ``importance``.

    Args:
        most: the sum ends when it is above this.
        work: float32 [3 K + 7, _LANES], scratch.
    """
    if scale == 0:
        return _F32(np.inf)
    widths, shared = lam.shape[0], targets.shape[0] == 1
    u, weight, scratch = work[:widths], work[widths : 2 * widths], work[2 * widths : 3 * widths + 5]
    codes, cost = work[3 * widths + 5], work[3 * widths + 6]
    inverse, total = _F32(1) / scale, _F32(0)
    for begin in range(first, last, _LANES):
        count = min(_LANES, last - begin)
        for k in range(widths):
            target, lam_k = targets[0 if shared else k, row, begin : begin + count], lam[k, begin : begin + count]
            for r in range(count):
                u[k, r] = target[r] * inverse + zero
            for r in range(count):
                weight[k, r] = lam_k[r] * importance[begin + r]
            weight[k, count:] = _F32(0)
        best_codes(u, weight, grid, master_codes, centre, nested, scratch, codes, cost)
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
    importance,
    lam,
    grid,
    master_codes,
    centre,
    nested,
    clips,
    zero_points,
    mantissa_bits,
    min_exponent,
    scales,
    zeros,
):
    """Scale and zero point of every row for the group of columns first..last.

    Tries clips of the group's range about each zero point (NaN: that which follows from the range) and keeps the pair of
    least nested rounding error, weighted by ``importance`` (float32 [columns]): every fourth clip first, then those beside
    the best, two and one steps away. With a single clip and zero point it is plain min-max.

    Args:
        targets: float32 [T, rows, columns], with all feedback so far.
        scales, zeros: float32 [rows], out.
    """
    widths, count, points = lam.shape[0], clips.shape[0], zero_points.shape[0]
    step, codes = grid[0, widths - 1], _F32(master_codes)
    coarse = (count + 3) // 4
    trials = coarse * points + 4 if count * points > 1 else 0
    for row in numba.prange(targets.shape[1]):
        work = np.zeros((3 * widths + 7, _LANES), dtype=np.float32)
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
                low, high, clips[clip], zero_points[point], step, codes, centre, mantissa_bits, min_exponent
            )
            cost = _rounding_cost(
                targets, row, first, last, scale, zero, importance, lam, grid, master_codes, centre, nested, best, work
            )
            if cost < best:
                best, best_clip, best_point = cost, clip, point
        scales[row], zeros[row] = _range_grid(
            low, high, clips[best_clip], zero_points[best_point], step, codes, centre, mantissa_bits, min_exponent
        )


# Choosing the codes of many columns


@numba.njit(parallel=True, cache=True)
def solve_columns(targets, factor, lam, grid, master_codes, centre, nested, first, last, scales, zeros, codes, errors):
    """Choose the codes of the columns first..last of every row, feeding each column's error into the later ones.

    Args:
        targets: float32 [T, rows, columns].
        factor: float32 [F, last - first, last - first], the block of each inverse Hessian's upper Cholesky factor.
        scales, zeros: float32 [rows], of the group in which these columns lie.
        codes: uint8 [rows, columns], out.
        errors: float32 [T, rows, last - first], out: each target's error over the factor's diagonal.
    """
    count, widths, factors, columns = targets.shape[0], lam.shape[0], factor.shape[0], last - first
    for tile in numba.prange(_tiles(targets.shape[1])):
        begin = tile * _LANES
        end = min(begin + _LANES, targets.shape[1])
        block = np.zeros((count, columns, _LANES), dtype=np.float32)
        error = np.zeros((count, columns, _LANES), dtype=np.float32)
        work = np.zeros((3 * widths + 7, _LANES), dtype=np.float32)
        scale, inverse = _lanes_of(scales, begin, end)
        zero = np.zeros(_LANES, dtype=np.float32)
        zero[: end - begin] = zeros[begin:end]
        _turn(targets[:, begin:end, first:last], block)
        u, weight, q = work[:widths], work[widths : 2 * widths], work[3 * widths + 5]
        for i in range(columns):
            for k in range(widths):
                target, out = block[0 if count == 1 else k, i], u[k]
                for r in range(_LANES):
                    out[r] = target[r] * inverse[r] + zero[r]
                weight[k, :] = lam[k, first + i]
            best_codes(u, weight, grid, master_codes, centre, nested, work[2 * widths : 3 * widths + 5], q, work[-1])
            for r in range(end - begin):
                codes[begin + r, first + i] = np.uint8(q[r])
            # One shared target is fed the plain mean of the widths' errors, as MatGPTQ v1 does.
            part = _F32(1) / widths if count == 1 else _F32(1)
            for k in range(widths):
                out, target = error[0 if count == 1 else k, i], u[k]
                share = part / factor[0 if factors == 1 else k, i, i]
                for r in range(_LANES):
                    wrong = target[r] - _value(q[r], grid[0, k], grid[2, k], centre)
                    out[r] += wrong * scale[r] * share
            _feed_back(block, error, factor, i, columns)
        for k in range(count):
            for r in range(end - begin):
                for i in range(columns):
                    errors[k, begin + r, i] = error[k, i, r]


@numba.njit(cache=True)
def _feed_back(block, error, factor, i, columns):
    """Take the error of column i out of the columns that come before the next part, or at a part's end that of the whole
    part out of all later ones."""
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
def sweep_columns(gradient, hessian, lam, grid, master_codes, centre, nested, first, last, scales, codes, moves):
    """One pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Each weight in turn takes the best of all codes while the others stay. In a column with curvature h, a width's error as
    a function of its value v is h (v - (w - g/h))^2 plus a constant, with w the present value and g half the gradient:
    the best code is that of the targets w - g/h.

    Args:
        gradient: float32 [K, rows, columns], half the gradient.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
        scales: float32 [rows], of the group in which these columns lie.
        codes: uint8 [rows, columns], in and out.
        moves: float32 [K, rows, last - first], out: change of each width's value.
    """
    widths, hessians, columns = lam.shape[0], hessian.shape[0], last - first
    for tile in numba.prange(_tiles(codes.shape[0])):
        begin = tile * _LANES
        end = min(begin + _LANES, codes.shape[0])
        block = np.zeros((widths, columns, _LANES), dtype=np.float32)
        moved = np.zeros((widths, columns, _LANES), dtype=np.float32)
        work = np.zeros((3 * widths + 7, _LANES), dtype=np.float32)
        old = np.zeros(_LANES, dtype=np.float32)
        scale, inverse = _lanes_of(scales, begin, end)
        _turn(gradient[:, begin:end, first:last], block)
        u, weight, q = work[:widths], work[widths : 2 * widths], work[3 * widths + 5]
        for i in range(columns):
            for r in range(end - begin):
                old[r] = _F32(codes[begin + r, first + i])
            for k in range(widths):
                slope, out, share = block[k, i], u[k], _F32(1) / hessian[0 if hessians == 1 else k, i, i]
                for r in range(_LANES):
                    out[r] = _value(old[r], grid[0, k], grid[2, k], centre) - slope[r] * inverse[r] * share
                weight[k, :] = lam[k, first + i]
            best_codes(u, weight, grid, master_codes, centre, nested, work[2 * widths : 3 * widths + 5], q, work[-1])
            for r in range(end - begin):
                codes[begin + r, first + i] = np.uint8(q[r])
            for k in range(widths):
                move, any_move = moved[k, i], _F32(0)
                for r in range(_LANES):
                    now = _value(q[r], grid[0, k], grid[2, k], centre)
                    move[r] = (now - _value(old[r], grid[0, k], grid[2, k], centre)) * scale[r]
                for r in range(_LANES):
                    any_move = move[r] if move[r] != 0 else any_move
                if any_move != 0:
                    # What lies behind is not looked at again.
                    coupling = hessian[0 if hessians == 1 else k, i]
                    for j in range(i + 1, columns):
                        _subtract(block[k, j], move, -coupling[j])
        for k in range(widths):
            for r in range(end - begin):
                for i in range(columns):
                    moves[k, begin + r, i] = moved[k, i, r]


@numba.njit(cache=True)
def _tiles(rows):
    return (rows + _LANES - 1) // _LANES


@numba.njit(cache=True)
def _lanes_of(scales, begin, end):
    """The scale of each lane and its inverse; 0 in lanes without a row, and for the inverse of 0."""
    out = np.zeros((2, _LANES), dtype=np.float32)
    for r in range(end - begin):
        out[0, r] = scales[begin + r]
        out[1, r] = _F32(1) / scales[begin + r] if scales[begin + r] != 0 else _F32(0)
    return out[0], out[1]


@numba.njit(cache=True)
def _turn(matrix, out):
    """[k, rows, columns] into [k, columns, lanes]."""
    for k in range(matrix.shape[0]):
        for r in range(matrix.shape[1]):
            for j in range(matrix.shape[2]):
                out[k, j, r] = matrix[k, r, j]
