"""The row solver: what happens to one row of weights does not depend on any other row.

Compiled with numba, rows in parallel. Throughout, K is the number of widths in the objective (ascending, each with a weight
above zero), T the number of compensated targets (K, or 1 when all widths share one), and

    base   float32 [K + 1, 2^M]   decoded value of each code in units of its scale; the last row is that of M bits
    lam    float32 [K]            weight of each width's squared error

All arithmetic is float32 without reassociation, so a choice never depends on the number of threads.
"""

import math

import numba
import numpy as np

_F32 = np.float32

FROM_RANGE = np.float32(np.nan)  # stands for a zero point that follows from a group's smallest and largest weight


@numba.njit(cache=True)
def best_code(t, weight, base, scale, zero):
    """The code of least sum_k weight_k (t_k - scale (base_k(q) - zero))^2 over all 2^M codes.

    Ties go to the code whose M-bit value is nearest to the highest width's target, then to the lowest code: bits that no
    width of the objective sees still follow the weight. Every width's value grows with the code, so the scan outwards from
    a good start ends, in each direction, at the first code where one width alone costs more than the best so far: the
    result is that of trying all codes.

    Args:
        t, weight: float32 [K], target and weight of each width.
    """
    widths, codes = t.shape[0], base.shape[1]
    if scale == 0:
        return codes // 2
    top = t[widths - 1]
    start = int(min(max(np.rint(top / scale + zero - base[widths, 0]), _F32(0)), _F32(codes - 1)))
    best, best_distance, chosen = _F32(np.inf), _F32(np.inf), start
    for direction in (1, -1):
        q = start if direction == 1 else start - 1
        while 0 <= q < codes:
            cost, beyond = _F32(0), False
            for k in range(widths):
                error = t[k] - scale * (base[k, q] - zero)
                part = weight[k] * error * error
                cost += part
                if part > best and error * direction <= 0:
                    beyond = True
            if cost <= best:
                distance = abs(top - scale * (base[widths, q] - zero))
                closer = distance < best_distance or (distance == best_distance and q < chosen)
                if cost < best or closer:
                    best, best_distance, chosen = cost, distance, q
            if beyond:
                break
            q += direction
    return chosen


@numba.njit(cache=True)
def round_scale(value, mantissa_bits, min_exponent):
    """``value`` (not negative) rounded to a float with that many mantissa bits, subnormals below 2^min_exponent."""
    if value == 0:
        return _F32(0)
    exponent = max(math.frexp(value)[1] - 1, min_exponent)
    step = math.ldexp(1.0, exponent - mantissa_bits)
    return _F32(np.rint(value / step) * step)


@numba.njit(cache=True)
def _grid(low, high, clip, base, zero, mantissa_bits, min_exponent):
    """Scale and zero point at which the levels of the objective's highest width cover the clipped range low..high.

    About a given zero point; with ``FROM_RANGE`` about the whole number that fits the range best.
    """
    codes, top = base.shape[1], base.shape[0] - 2
    span = base[top, codes - 1] - base[top, 0]
    if not math.isnan(zero):
        below, above = span / 2 + (zero - codes // 2), span / 2 - (zero - codes // 2)
        return round_scale(max(-low / below, high / above) * clip, mantissa_bits, min_exponent), zero
    scale = round_scale((high - low) * clip / span, mantissa_bits, min_exponent)
    if scale == 0:
        return scale, _F32(codes // 2)
    # The lowest level, base - zero, lands on the lower end.
    return scale, _F32(min(max(np.rint(base[top, 0] - low * clip / scale), 0.0), codes - 1.0))


@numba.njit(cache=True)
def choose_scale(targets, row, first, last, importance, lam, base, clips, zero_points, mantissa_bits, min_exponent):
    """Scale and zero point of the group of columns first..last of one row.

    Tries each clip of the group's range about each zero point (or ``FROM_RANGE``) and keeps the pair of least nested
    rounding error, weighted by ``importance`` (float32 [columns]); with a single clip and zero point it is plain min-max.
    """
    shared, widths = targets.shape[0] == 1, lam.shape[0]
    weight = np.empty(widths, dtype=np.float32)
    t = np.empty(widths, dtype=np.float32)
    top = targets[targets.shape[0] - 1, row]
    low, high = _F32(0), _F32(0)
    for j in range(first, last):
        low, high = min(low, top[j]), max(high, top[j])
    if clips.shape[0] == 1 and zero_points.shape[0] == 1:
        return _grid(low, high, clips[0], base, zero_points[0], mantissa_bits, min_exponent)
    best, scale, zero = _F32(np.inf), _F32(0), _F32(base.shape[1] // 2)
    for zero_point in zero_points:
        for clip in clips:
            s, z = _grid(low, high, clip, base, zero_point, mantissa_bits, min_exponent)
            total = _F32(0)
            for j in range(first, last):
                for k in range(widths):
                    t[k] = targets[0 if shared else k, row, j]
                    weight[k] = lam[k, j]
                q = best_code(t, weight, base, s, z)
                cost = _F32(0)
                for k in range(widths):
                    error = t[k] - s * (base[k, q] - z)
                    cost += weight[k] * error * error
                total += cost * importance[j]
                if total > best:
                    break
            if total < best:
                best, scale, zero = total, s, z
    return scale, zero


@numba.njit(parallel=True, cache=True)
def solve_columns(
    targets, errors, codes, scales, zeros, factor, importance, lam, base, first, last, group_size, clips, zero_points,
    mantissa_bits, min_exponent,
):  # fmt: skip
    """Choose the codes of the columns first..last of every row, feeding each column's error into the later ones.

    Args:
        targets: float32 [T, rows, columns]; the columns first..last are updated in place by the feedback.
        errors: float32 [T, rows, last - first], out: each target's error over the factor's diagonal.
        codes: uint8 [rows, columns], out.
        scales, zeros: float32 [rows, groups]; the groups that begin in these columns are chosen here, from weights that
            have seen all feedback so far.
        factor: float32 [F, last - first, last - first], the block of each inverse Hessian's upper Cholesky factor.
        importance: float32 [columns].
    """
    count, widths, factors = targets.shape[0], lam.shape[0], factor.shape[0]
    for row in numba.prange(targets.shape[1]):
        t = np.empty(widths, dtype=np.float32)
        weight = np.empty(widths, dtype=np.float32)
        for i in range(last - first):
            column = first + i
            group = column // group_size
            if column % group_size == 0:
                scales[row, group], zeros[row, group] = choose_scale(
                    targets, row, column, column + group_size, importance, lam, base, clips, zero_points, mantissa_bits,
                    min_exponent,
                )  # fmt: skip
            scale, zero = scales[row, group], zeros[row, group]
            for k in range(widths):
                t[k] = targets[0 if count == 1 else k, row, column]
                weight[k] = lam[k, column]
            q = best_code(t, weight, base, scale, zero)
            codes[row, column] = q
            # One shared target is fed the plain mean of the widths' errors, as MatGPTQ v1 does.
            mean = _F32(0)
            for k in range(widths):
                error = (t[k] - scale * (base[k, q] - zero)) / factor[0 if factors == 1 else k, i, i]
                mean += error / widths
                if count > 1 or widths == 1:
                    errors[k, row, i] = error
            if count == 1 and widths > 1:
                errors[0, row, i] = mean
            for k in range(count):
                error, f = errors[k, row, i], 0 if factors == 1 else k
                for j in range(i + 1, last - first):
                    targets[k, row, first + j] -= error * factor[f, i, j]


@numba.njit(parallel=True, cache=True)
def sweep_columns(codes, moves, gradient, hessian, scales, zeros, lam, base, first, last, group_size):
    """One pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Each weight in turn takes the best of all codes while the others stay. In a column with curvature h, a width's error as
    a function of its value v is h (v - (w - g/h))^2 plus a constant, with w the present value and g half the gradient:
    the best code is that of the targets w - g/h.

    Args:
        codes: uint8 [rows, columns], in and out.
        moves: float32 [K, rows, last - first], out: change of each width's value.
        gradient: float32 [K, rows, last - first], half the gradient in these columns; updated in place.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
    """
    widths, hessians = lam.shape[0], hessian.shape[0]
    for row in numba.prange(codes.shape[0]):
        t = np.empty(widths, dtype=np.float32)
        weight = np.empty(widths, dtype=np.float32)
        for i in range(last - first):
            column = first + i
            scale, zero = scales[row, column // group_size], zeros[row, column // group_size]
            old = codes[row, column]
            for k in range(widths):
                curvature = hessian[0 if hessians == 1 else k, i, i]
                t[k] = scale * (base[k, old] - zero) - gradient[k, row, i] / curvature
                weight[k] = lam[k, column]
            q = best_code(t, weight, base, scale, zero)
            codes[row, column] = q
            for k in range(widths):
                move = scale * (base[k, q] - base[k, old])
                moves[k, row, i] = move
                if move != 0:
                    f = 0 if hessians == 1 else k
                    for j in range(last - first):
                        gradient[k, row, j] += move * hessian[f, i, j]
