"""Slices as the whole-number codes of stock formats: value = scale (code - zero), with codes of 2 to 8 bits.

A b-bit slice of M-bit codes has the value s (2^d (c + h) - z), with d = M - b, and h = 1/2 (msb) or 0 (round). For a whole
k such that every u = k (h - z / 2^d) is whole, that is s t (k c + u) with t = 2^d / k: the scale s t, the codes k c and the
zero point -u, both moved by the same number into 0..2^B - 1. A symmetric code has the zero point 2^(B-1). Scales keep their
sign, as a mirrored group is one whose scale is negative; nothing that multiplies by a scale minds. All groups of a row are
equal: the formats refuse a shorter last one (``check_equal_groups``).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, Slicing, slice_codes

_FACTORS = tuple(2**i for i in range(9))  # k; finer steps than 2^8 fit in no code
_CHUNK = 2**22  # weights of which ``nearest`` holds float32 values at a time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IntegerGrid:
    """The whole-number grid of one layer.

    Attributes:
        bits: of a code.
        symmetric: whether every zero point is 2^(bits-1).
        factor: k; codes of the slice lie this far apart.
        flipped: whether codes count downwards, with scales of the other sign.
    """

    bits: int
    symmetric: bool
    factor: int
    flipped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IntegerWeight:
    """A matrix of whole-number codes: value = scale (code - zero).

    Attributes:
        codes: uint8 [out_features, in_features], below 2^bits.
        scales: float16, bfloat16 or float32 [out_features, groups].
        zeros: int32 [out_features, groups], 2^(bits-1) throughout if symmetric.
    """

    bits: int
    symmetric: bool
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features]."""
        rows, groups = self.scales.shape
        values = self.codes.view(rows, groups, -1).float() - self.zeros[:, :, None].float()
        return (values * self.scales[:, :, None].float()).view(rows, -1)


def exact_grid(
    slice_bits: int,
    master_bits: int,
    slicing: Slicing,
    zero_points: Iterable[float],
    supported: Sequence[tuple[int, bool]],
    min_zero_point: int = 0,
) -> IntegerGrid | None:
    """The first grid of a format that holds a slice exactly.

    Args:
        slice_bits, master_bits, slicing: of the slice.
        zero_points: z of all groups, in steps of a master code.
        supported: (bits, symmetric) of the codes that the format has, the best first.
        min_zero_point: the smallest zero point that it can store.

    Returns:
        None when there is none.
    """
    ratio = 2 ** (master_bits - slice_bits)
    half = Fraction(1, 2) if slicing == "msb" and slice_bits <= master_bits else Fraction(0)
    shifts = {half - Fraction(z) / ratio for z in set(zero_points)}
    factor = next((k for k in _FACTORS if all((k * shift).denominator == 1 for shift in shifts)), None)
    if factor is None:
        return None
    lows = [int(factor * shift) for shift in shifts]
    span = factor * (2**slice_bits - 1)
    for bits, symmetric in supported:
        middle, top = 2 ** (bits - 1), 2**bits - 1
        if not symmetric:
            moves = [max(0, low + min_zero_point) for low in lows]
            fits = all(span + m <= top and m - low <= top for m, low in zip(moves, lows, strict=True))
            if fits:
                return IntegerGrid(bits=bits, symmetric=False, factor=factor)
        elif all(-middle <= low and low + span < middle for low in lows):
            return IntegerGrid(bits=bits, symmetric=True, factor=factor)
        elif all(-middle <= -low - span and -low < middle for low in lows):
            return IntegerGrid(bits=bits, symmetric=True, factor=factor, flipped=True)
    return None


def zero_points(weight: NestedWeight) -> Tensor:
    """z of each group: float32 [out_features, groups], or [1, 1] when it is one number for all."""
    if weight.zeros is None:
        return torch.full((1, 1), weight.format.zero_point)
    return weight.zeros.float()


def on_grid(weight: NestedWeight, slice_bits: int, grid: IntegerGrid, min_zero_point: int = 0) -> IntegerWeight:
    """A slice as codes of a grid that ``exact_grid`` found for it, without any loss.

    Raises:
        UserError: a scale on that grid is no number of the scales' dtype.
    """
    rows, groups = weight.scales.shape
    ratio = 2.0 ** (weight.format.master_bits - slice_bits)
    half = 0.5 if weight.format.slicing == "msb" else 0.0
    low = (grid.factor * (half - zero_points(weight).double() / ratio)).round().int().expand(rows, groups)
    sliced = slice_codes(weight.codes, slice_bits, weight.format.master_bits, weight.format.slicing).view(
        rows, groups, -1
    )
    steps = grid.factor * sliced.int()
    sign = -1 if grid.flipped else 1
    if grid.symmetric:
        zeros = torch.full_like(low, 2 ** (grid.bits - 1))
        codes = sign * (steps + low[:, :, None]) + zeros[:, :, None]
    else:
        move = (low + min_zero_point).clamp(min=0)
        zeros, codes = move - low, steps + move[:, :, None]
    wanted = weight.scales.double() * (sign * ratio / grid.factor)
    scales = wanted.to(weight.scales.dtype)
    if not torch.equal(scales.double(), wanted):
        raise UserError(
            f"At {slice_bits} bits, scales of this grid are too large or too small for {weight.scales.dtype}. Quantize the "
            "model in bfloat16 (model.dtype=bfloat16), or take the nearest codes: pack.rounding=nearest."
        )
    return IntegerWeight(
        bits=grid.bits,
        symmetric=grid.symmetric,
        codes=codes.to(torch.uint8).view(weight.codes.shape),
        scales=scales,
        zeros=zeros.int(),
    )


def nearest(weight: NestedWeight, slice_bits: int, bits: int) -> IntegerWeight:
    """The symmetric codes of ``bits`` bits nearest to a slice, by squared error.

    Each group's scale is the best of some that reach from its largest value down to a part of it.
    """
    rows, groups = weight.scales.shape
    step = max(1, _CHUNK // weight.codes.shape[1])
    codes, scales = torch.empty_like(weight.codes), torch.empty_like(weight.scales)
    for start in range(0, rows, step):
        strip = slice(start, start + step)
        part = dataclasses.replace(
            weight,
            codes=weight.codes[strip],
            scales=weight.scales[strip],
            zeros=None if weight.zeros is None else weight.zeros[strip],
        )
        values = part.dequantize(slice_bits).view(-1, groups, weight.format.group_size)
        found, chosen = fit_groups(values, bits, weight.scales.dtype)
        codes[strip], scales[strip] = found.view(-1, weight.codes.shape[1]), chosen
    zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int32)
    return IntegerWeight(bits=bits, symmetric=True, codes=codes, scales=scales, zeros=zeros)


def fit_groups(values: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales of values [rows, groups, group_size]; the longer side of a group becomes the negative one."""
    middle = 2 ** (bits - 1)
    low, high = values.amin(-1), values.amax(-1)
    reach = torch.maximum(-low, high) / middle * torch.where(high > -low, -1.0, 1.0)
    least = torch.full_like(reach, torch.inf)
    best = torch.zeros_like(reach, dtype=dtype)
    smallest, tried = (0.6, 41) if bits < 4 else (0.9, 13)
    for part in torch.linspace(1.02, smallest, tried).tolist():
        scales = (reach * part).to(dtype)
        error = (_rounded(values, scales, middle) * scales.float()[:, :, None] - values).square_().sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return (_rounded(values, best, middle) + middle).to(torch.uint8), best


def _rounded(values: Tensor, scales: Tensor, middle: int) -> Tensor:
    """The whole multiples of the scales nearest to values [rows, groups, group_size], in -middle..middle - 1."""
    divisor = torch.where(scales == 0, 1, scales).float()[:, :, None]
    return (values / divisor).round_().clamp_(-middle, middle - 1)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits in 32-bit words, along the last dimension: code i has the bits from ``bits * i`` on.

    It is the order of both formats, whether ``bits`` divides 32 or not. (compressed-tensors before 0.18 left bits unused where
    it does not; vLLM never read it so.)

    Args:
        values: whole numbers below 2^bits, [..., n].

    Returns:
        int32 [..., ceil(n bits / 32)].
    """
    count = values.shape[-1]
    words = -(-count * bits // 32)
    padded = torch.nn.functional.pad(values.to(torch.int64), (0, -(-words * 32 // bits) - count))
    if 32 % bits == 0:
        lanes = padded.view(*values.shape[:-1], words, 32 // bits)
        packed = (lanes << (torch.arange(32 // bits) * bits)).sum(-1)
    else:
        stream = (padded[..., None] >> torch.arange(bits)) & 1  # one number for each bit
        stream = stream.flatten(-2)[..., : words * 32].unflatten(-1, (words, 32))
        packed = (stream << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
