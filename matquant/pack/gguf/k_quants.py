"""Encoders of the K types of ggml, in blocks of 256 columns, by least squares.

A block has 8 or 16 parts with integer scales of their own, which one float16 number d multiplies:

    Q2_K, Q4_K, Q5_K   value = d sc q - dmin m     q in 0..2^bits - 1, sc and m unsigned (4 bits in Q2_K, 6 in the others)
    Q3_K, Q6_K         value = d sc q              q in -2^(bits-1)..2^(bits-1) - 1, sc signed (6 and 8 bits)

First every part gets its best real scale (and minimum) on a grid of candidates. Then these are rounded to multiples of d
(and dmin), the codes are chosen again, and d (and dmin) are solved for by least squares.
"""

import torch
from torch import Tensor

BLOCK = 256

_REFITS = 2
_TRIED = 13  # scales of a part of the symmetric types, from 0.8 to 1.1 of the smallest that clips nothing


def encode_q2(blocks: Tensor) -> Tensor:
    """Blocks of ``Q2_K``: float32 [blocks, 256] to uint8 [blocks, 84]."""
    q, scales, minima, d, dmin = _fit_with_minima(blocks.view(-1, 16, 16), bits=2, scale_bits=4)
    return torch.cat([scales | (minima << 4), _pack_pairs(q.view(-1, 2, 4, 32)), d, dmin], 1)


def encode_q3(blocks: Tensor) -> Tensor:
    """Blocks of ``Q3_K``: float32 [blocks, 256] to uint8 [blocks, 110]."""
    q, scales, d = _fit_symmetric(blocks.view(-1, 16, 16), bits=3, largest=31)
    codes = (q + 4).to(torch.uint8).view(-1, 256)
    high = ((codes >> 2).view(-1, 8, 32) << _shifts(8)[:, None]).sum(1).to(torch.uint8)
    packed = (scales + 32).to(torch.uint8)
    low = (packed[:, :8] & 15) | ((packed[:, 8:] & 15) << 4)
    top = ((packed >> 4).view(-1, 4, 4) << (2 * _shifts(4))[:, None]).sum(1).to(torch.uint8)
    return torch.cat([high, _pack_pairs((codes & 3).view(-1, 2, 4, 32)), low, top, d], 1)


def encode_q4(blocks: Tensor) -> Tensor:
    """Blocks of ``Q4_K``: float32 [blocks, 256] to uint8 [blocks, 144]."""
    q, scales, minima, d, dmin = _fit_with_minima(blocks.view(-1, 8, 32), bits=4, scale_bits=6)
    return torch.cat([d, dmin, _pack_scales(scales, minima), _pack_halves(q.view(-1, 4, 2, 32))], 1)


def encode_q5(blocks: Tensor) -> Tensor:
    """Blocks of ``Q5_K``: float32 [blocks, 256] to uint8 [blocks, 176]."""
    q, scales, minima, d, dmin = _fit_with_minima(blocks.view(-1, 8, 32), bits=5, scale_bits=6)
    high = ((q.view(-1, 8, 32) >> 4) << _shifts(8)[:, None]).sum(1).to(torch.uint8)
    return torch.cat([d, dmin, _pack_scales(scales, minima), high, _pack_halves((q & 15).view(-1, 4, 2, 32))], 1)


def encode_q6(blocks: Tensor) -> Tensor:
    """Blocks of ``Q6_K``: float32 [blocks, 256] to uint8 [blocks, 210]."""
    q, scales, d = _fit_symmetric(blocks.view(-1, 16, 16), bits=6, largest=127)
    codes = (q + 32).to(torch.uint8).view(-1, 256)
    low = (codes & 15).view(-1, 2, 2, 64)
    return torch.cat(
        [
            (low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1),
            _pack_pairs((codes >> 4).view(-1, 2, 4, 32)),
            scales.to(torch.int8).view(torch.uint8),
            d,
        ],
        1,
    )


def _fit_with_minima(parts: Tensor, bits: int, scale_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and minima of parts [blocks, parts, size]: all uint8, with d and dmin as bytes of float16."""
    top, largest = 2**bits - 1, 2**scale_bits - 1
    step, minimum = _best_steps(parts, top)
    d, scales = _rounded_to_multiples(step, largest)
    dmin, minima = _rounded_to_multiples(minimum, largest)
    q = torch.zeros_like(parts)
    for refit in range(_REFITS + 1):
        factor = (d[:, None] * scales)[:, :, None]
        offset = (dmin[:, None] * minima)[:, :, None]
        q = ((parts + offset) / torch.where(factor == 0, 1, factor)).round_().clamp_(0, top)
        if refit < _REFITS:
            d, dmin = _least_squares(parts, q * scales[:, :, None], -minima[:, :, None].expand_as(q), d, dmin)
    return (q.to(torch.uint8), scales.to(torch.uint8), minima.to(torch.uint8), _half_bytes(d), _half_bytes(dmin))


def _best_steps(parts: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Best step and minimum of each part among grids that reach from its smallest to its largest value: [blocks, parts]."""
    low, high = parts.amin(2).clamp(max=0), parts.amax(2)
    best_step, least = torch.zeros_like(low), torch.full_like(low, torch.inf)
    for count in range(1, top + 1):
        step = ((high - low) / count).clamp(min=0)
        divisor = torch.where(step == 0, 1, step)[:, :, None]
        q = ((parts - low[:, :, None]) / divisor).round_().clamp_(0, top)
        error = (q * step[:, :, None] + low[:, :, None] - parts).square_().sum(2)
        # A coarser step of equal error has smaller codes, so that rounding of the step costs less: the first one stays.
        better = error < least * (1 - 1e-6)
        best_step, least = torch.where(better, step, best_step), torch.where(better, error, least)
    return best_step, -low


def _least_squares(target: Tensor, x: Tensor, y: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """float16 numbers (d, dmin) that minimize (target - d x - dmin y)^2 of each block; the given ones where it is singular."""
    dims = (1, 2)
    xx, xy, yy = (x * x).sum(dims), (x * y).sum(dims), (y * y).sum(dims)
    tx, ty = (target * x).sum(dims), (target * y).sum(dims)
    determinant = xx * yy - xy * xy
    solvable = determinant > 1e-6 * xx * yy
    safe = torch.where(solvable, determinant, 1)
    new_d = torch.where(solvable, (tx * yy - ty * xy) / safe, d)
    new_dmin = torch.where(solvable, (ty * xx - tx * xy) / safe, dmin)
    fits = (new_d >= 0) & (new_dmin >= 0)
    return torch.where(fits, new_d, d).half().float(), torch.where(fits, new_dmin, dmin).half().float()


def _fit_symmetric(parts: Tensor, bits: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (float) and scales (int32) of parts [blocks, parts, size], and d as bytes of float16."""
    middle = 2 ** (bits - 1)
    low, high = parts.amin(2), parts.amax(2)
    reach = torch.maximum(-low, high) * torch.where(high > -low, -1.0, 1.0)
    best, least = torch.zeros_like(reach), torch.full_like(reach, torch.inf)
    whole = [sign / count for count in range(middle, middle // 2, -1) for sign in (1, -1)]
    for share in whole + (torch.linspace(0.8, 1.1, _TRIED) / middle).tolist():
        q = _symmetric_codes(parts, reach * share, middle)
        norm = q.square().sum(2)
        step = (q * parts).sum(2) / torch.where(norm == 0, 1, norm)
        error = (q * step[:, :, None] - parts).square_().sum(2)
        better = error < least * (1 - 1e-6)
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    d, scales = _rounded_to_multiples(best, largest)
    q = torch.zeros_like(parts)
    for refit in range(_REFITS + 1):
        q = _symmetric_codes(parts, d[:, None] * scales, middle)
        if refit < _REFITS:
            x = q * scales[:, :, None]
            norm = (x * x).sum((1, 2))
            d = torch.where(norm > 0, (parts * x).sum((1, 2)) / torch.where(norm == 0, 1, norm), d).half().float()
    return q, scales.int(), _half_bytes(d)


def _symmetric_codes(parts: Tensor, step: Tensor, middle: int) -> Tensor:
    """Whole multiples of the steps [blocks, parts] nearest to values [blocks, parts, size]."""
    return (parts / torch.where(step == 0, 1, step)[:, :, None]).round_().clamp_(-middle, middle - 1)


def _rounded_to_multiples(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """float16 number d of each block (as float32), and multiples of it nearest to values [blocks, parts].

    The largest value of a block becomes one of the upper half of the multiples: the one with the least squared error.
    """
    top = values.abs().amax(1)
    best, least = torch.zeros_like(top), torch.full_like(top, torch.inf)
    for multiple in range(largest, largest // 2, -1):
        d = (top / multiple).half().float()
        error = (_multiples(values, d, largest) * d[:, None] - values).square_().sum(1)
        better = error < least
        best, least = torch.where(better, d, best), torch.where(better, error, least)
    return best, _multiples(values, best, largest)


def _multiples(values: Tensor, d: Tensor, largest: int) -> Tensor:
    """Whole multiples of d [blocks] nearest to values [blocks, parts]; 0 where d is 0."""
    found = (values / torch.where(d == 0, 1, d)[:, None]).round_().clamp_(-largest, largest)
    return torch.where(d[:, None] == 0, 0, found)


def _half_bytes(values: Tensor) -> Tensor:
    """Bytes of float16 numbers: [blocks] to uint8 [blocks, 2]."""
    return values.half()[:, None].contiguous().view(torch.uint8)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Two bits of each code, four to a byte: [blocks, 2, 4, 32] to uint8 [blocks, 64]."""
    return (codes << (2 * _shifts(4))[:, None]).sum(2).to(torch.uint8).flatten(1)


def _pack_halves(codes: Tensor) -> Tensor:
    """Four bits of each code, two to a byte: [blocks, 4, 2, 32] to uint8 [blocks, 128]."""
    return (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1)


def _pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Scales and minima of 6 bits, uint8 [blocks, 8] each: uint8 [blocks, 12]."""
    first = (scales[:, :4] & 63) | ((scales[:, 4:] >> 4) << 6)
    second = (minima[:, :4] & 63) | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], 1)


def _shifts(count: int) -> Tensor:
    return torch.arange(count)
