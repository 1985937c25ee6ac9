"""The row solver: what happens to one row of weights does not depend on any other row.

Compiled with numba, rows in parallel. Throughout, K is the number of widths in the objective (ascending, each with a weight
above zero), T the number of compensated targets (K, or 1 when all widths share one), and

    base   float32 [K + 1, 2^M]    decoded value of each code in units of its scale; the last row is that of M bits
    lam    float32 [K, columns]    weight of each width's squared error in each column

All arithmetic is float32 without reassociation, so a choice never depends on the number of threads.
"""

import math

import numba
import numpy as np

_F32 = np.float32

_WINDOW = 16  # codes that are tried at once
_SCRATCH = _WINDOW + 8  # their costs, and on the way to the least of them

FROM_RANGE = np.float32(np.nan)  # stands for a zero point that follows from a group's smallest and largest weight


@numba.njit(cache=True)
def best_code(t, weight, base, scale, zero):
    """The code of least sum_k weight_k (t_k - scale (base_k(q) - zero))^2 over all 2^M codes.

    Ties go to the code whose M-bit value is nearest to the highest width's target, then to the lowest code: bits that no
    width of the objective sees still follow the weight.

    Args:
        t, weight: float32 [K], target and weight of each width.
    """
    values = np.empty((t.shape[0], base.shape[1]), dtype=np.float32)
    _fill_values(values, base, scale, zero)
    return _best_of(t, weight, values, np.empty(_SCRATCH, dtype=np.float32), base, scale, zero)[0]


@numba.njit(cache=True)
def _fill_values(values, base, scale, zero):
    """What each code decodes to at the widths of the objective, float32 [K, 2^M]."""
    for k in range(values.shape[0]):
        for q in range(values.shape[1]):
            values[k, q] = scale * (base[k, q] - zero)


@numba.njit(cache=True)
def _best_of(t, weight, values, costs, base, scale, zero):
    """``best_code`` and its cost, with the values of all codes at hand.

    Every width's value grows with the code, so that beyond a code what the widths whose targets have been passed cost
    there is a lower bound (in float32 too, whose rounding is monotone). Windows of codes (which become vector
    instructions) are tried outwards from a good start until, on each side, that bound is above the best: the result is
    that of trying all codes.

    Args:
        values: float32 [K, 2^M], what ``_fill_values`` makes.
        costs: float32 [_SCRATCH], scratch.
    """
    widths, codes = values.shape
    if scale == 0:
        cost = _F32(0)
        for k in range(widths):
            cost += weight[k] * t[k] * t[k]
        return codes // 2, cost
    top = t[widths - 1]
    start = int(min(max(np.rint(top / scale + zero - base[widths, 0]), _F32(0)), _F32(codes - 1)))
    best, best_distance, chosen = _F32(np.inf), _F32(np.inf), start
    low = max(min(start - _WINDOW // 2, codes - _WINDOW), 0)
    first, last = low, min(low + _WINDOW, codes)
    high = last
    while True:
        least = _window_costs(t, weight, values, first, last, costs)
        if least <= best:
            for i in range(last - first):
                if costs[i] == least:
                    distance = abs(top - scale * (base[widths, first + i] - zero))
                    closer = distance < best_distance or (distance == best_distance and first + i < chosen)
                    if least < best or closer:
                        best, best_distance, chosen = least, distance, first + i
        if high < codes and _passed(t, weight, values, high - 1, _F32(1)) <= best:
            first, last = high, min(high + _WINDOW, codes)
            high = last
        elif low > 0 and _passed(t, weight, values, low, _F32(-1)) <= best:
            first, last = max(low - _WINDOW, 0), low
            low = first
        else:
            return chosen, best


@numba.njit(cache=True)
def _window_costs(t, weight, values, first, last, costs):
    """Fill in the costs of the codes first..last, and return the least."""
    if last - first == _WINDOW:  # a length known to the compiler, and indices that cannot be negative
        begin, least8 = np.uintp(first), costs[_WINDOW:]
        for i in range(_WINDOW):
            costs[i] = _F32(0)
        for k in range(t.shape[0]):
            target, w = t[k], weight[k]
            for i in range(_WINDOW):
                error = target - values[k, begin + np.uintp(i)]
                costs[i] += w * error * error
        for i in range(8):
            least8[i] = costs[i] if costs[i] < costs[8 + i] else costs[8 + i]
        for i in range(4):
            least8[i] = least8[i] if least8[i] < least8[4 + i] else least8[4 + i]
        return min(min(least8[0], least8[1]), min(least8[2], least8[3]))
    least = _F32(np.inf)
    for i in range(last - first):
        cost = _F32(0)
        for k in range(t.shape[0]):
            error = t[k] - values[k, first + i]
            cost += weight[k] * error * error
        costs[i] = cost
        least = min(least, cost)
    return least


@numba.njit(cache=True)
def _passed(t, weight, values, q, direction):
    """What the widths cost at a code whose targets lie behind it, coming from the other side."""
    cost = _F32(0)
    for k in range(t.shape[0]):
        error = t[k] - values[k, q]
        cost += weight[k] * error * error if error * direction <= 0 else _F32(0)
    return cost


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
def choose_scale(
    targets,
    row,
    first,
    last,
    importance,
    lam,
    base,
    clips,
    zero_points,
    mantissa_bits,
    min_exponent,
    guess,
    values,
    costs,
):
    """Scale, zero point and number of the trial that found them, for the group of columns first..last of one row.

    Tries each clip of the group's range about each zero point (or ``FROM_RANGE``) and keeps the pair of least nested
    rounding error, weighted by ``importance`` (float32 [columns]); with a single clip and zero point it is plain min-max.

    Args:
        guess: number of the trial to make first. A good one lets the others end early, and changes no result.
        values, costs: scratch, as in ``_best_of``.
    """
    widths, trials = lam.shape[0], clips.shape[0] * zero_points.shape[0]
    top = targets[targets.shape[0] - 1, row]
    low, high = _F32(0), _F32(0)
    for j in range(first, last):
        low, high = min(low, top[j]), max(high, top[j])
    if trials == 1:
        scale, zero = _grid(low, high, clips[0], base, zero_points[0], mantissa_bits, min_exponent)
        return scale, zero, 0
    weight = np.empty((last - first, widths), dtype=np.float32)
    t = np.empty((last - first, widths), dtype=np.float32)
    for j in range(last - first):
        for k in range(widths):
            t[j, k] = targets[0 if targets.shape[0] == 1 else k, row, first + j]
            weight[j, k] = lam[k, first + j]
    best, found, scale, zero = _F32(np.inf), trials, _F32(0), _F32(base.shape[1] // 2)
    for turn in range(-1, trials):
        trial = guess if turn < 0 else turn
        if turn == guess:
            continue
        clip, zero_point = clips[trial % clips.shape[0]], zero_points[trial // clips.shape[0]]
        s, z = _grid(low, high, clip, base, zero_point, mantissa_bits, min_exponent)
        _fill_values(values, base, s, z)
        total = _F32(0)
        for j in range(last - first):
            total += _best_of(t[j], weight[j], values, costs, base, s, z)[1] * importance[first + j]
            if total > best:
                break
        if total < best or (total == best and trial < found):
            best, found, scale, zero = total, trial, s, z
    return scale, zero, min(found, trials - 1)


@numba.njit(parallel=True, cache=True)
def solve_columns(
    targets, errors, codes, scales, zeros, factor, importance, lam, base, first, last, group_size, clips, zero_points,
    mantissa_bits, min_exponent, guesses,
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
        guesses: int64 [rows], in and out: which trial gave a row's last scale, and is made first for the next.
    """
    count, widths, factors = targets.shape[0], lam.shape[0], factor.shape[0]
    for row in numba.prange(targets.shape[1]):
        t = np.empty(widths, dtype=np.float32)
        weight = np.empty(widths, dtype=np.float32)
        values, costs = np.empty((widths, base.shape[1]), dtype=np.float32), np.empty(_SCRATCH, dtype=np.float32)
        for i in range(last - first):
            column = first + i
            group = column // group_size
            if column % group_size == 0:
                scales[row, group], zeros[row, group], guesses[row] = choose_scale(
                    targets, row, column, column + group_size, importance, lam, base, clips, zero_points, mantissa_bits,
                    min_exponent, guesses[row], values, costs,
                )  # fmt: skip
            scale, zero = scales[row, group], zeros[row, group]
            if i == 0 or column % group_size == 0:
                _fill_values(values, base, scale, zero)
            for k in range(widths):
                t[k] = targets[0 if count == 1 else k, row, column]
                weight[k] = lam[k, column]
            q = _best_of(t, weight, values, costs, base, scale, zero)[0]
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
                # Both from index 0 on: only then does the loop become vector instructions.
                later, coupling = targets[k, row, column + 1 : last], factor[0 if factors == 1 else k, i, i + 1 :]
                error = errors[k, row, i]
                for j in range(coupling.shape[0]):
                    later[j] -= error * coupling[j]


@numba.njit(parallel=True, cache=True)
def sweep_columns(codes, moves, gradient, hessian, scales, zeros, lam, base, first, last, group_size):
    """One pass of coordinate descent over the columns first..last of every row, on the exact quadratic objective.

    Each weight in turn takes the best of all codes while the others stay. In a column with curvature h, a width's error as
    a function of its value v is h (v - (w - g/h))^2 plus a constant, with w the present value and g half the gradient:
    the best code is that of the targets w - g/h.

    Args:
        codes: uint8 [rows, columns], in and out.
        moves: float32 [K, rows, last - first], out: change of each width's value.
        gradient: float32 [K, rows, last - first], half the gradient in these columns; overwritten.
        hessian: float32 [F, last - first, last - first], the block on each Hessian's diagonal.
    """
    widths, hessians = lam.shape[0], hessian.shape[0]
    for row in numba.prange(codes.shape[0]):
        t = np.empty(widths, dtype=np.float32)
        weight = np.empty(widths, dtype=np.float32)
        values, costs = np.empty((widths, base.shape[1]), dtype=np.float32), np.empty(_SCRATCH, dtype=np.float32)
        for i in range(last - first):
            column = first + i
            scale, zero = scales[row, column // group_size], zeros[row, column // group_size]
            if i == 0 or column % group_size == 0:
                _fill_values(values, base, scale, zero)
            old = codes[row, column]
            for k in range(widths):
                curvature = hessian[0 if hessians == 1 else k, i, i]
                t[k] = scale * (base[k, old] - zero) - gradient[k, row, i] / curvature
                weight[k] = lam[k, column]
            q = _best_of(t, weight, values, costs, base, scale, zero)[0]
            codes[row, column] = q
            for k in range(widths):
                move = scale * (base[k, q] - base[k, old])
                moves[k, row, i] = move
                if move != 0:
                    # What lies behind is not looked at again.
                    later, coupling = gradient[k, row, i + 1 :], hessian[0 if hessians == 1 else k, i, i + 1 :]
                    for j in range(coupling.shape[0]):
                        later[j] += move * coupling[j]
