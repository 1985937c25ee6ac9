"""Shape of a product with bit planes, as far as it decides how kernels are compiled and launched."""

import dataclasses

import torch

from matquant.formats.bits import STRICT_BITS
from matquant.formats.nested import WeightFormat
from matquant.formats.tile_layout import TILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GemmShape:
    """Everything that a launch depends on except the addresses of the tensors.

    Attributes:
        tokens, rows, depth: M, N and K of y[M, N] = x[M, K] W[N, K]^T.
        bits: bit-width at which W is read.
        format: of the weight; a group size of K for one scale per row.
        dtype: of x, bias and y: float16 or bfloat16.
    """

    tokens: int
    rows: int
    depth: int
    bits: int
    format: WeightFormat
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Value of the macro GROUP: 0 for one scale per row."""
        return 0 if self.format.group_size == self.depth else self.format.group_size

    @property
    def planes(self) -> int:
        """Number of bit planes that are read."""
        return self.format.planes_read(self.bits)

    @property
    def nibble(self) -> int:
        """Codes of ``bits`` bits that share their first four bits; 1 for up to four bits."""
        return 1 << max(self.bits - STRICT_BITS, 0)

    @property
    def multiplies_nibbles(self) -> bool:
        """True if the first four bits of a code and the others are multiplied separately, since bfloat16 holds no code."""
        return self.dtype == torch.bfloat16 and (self.bits == 8 or self.format.stretch_at(self.bits) != 1)

    def defines(self) -> dict[str, int]:
        """Macros that all kernels share."""
        return {
            "BITS": self.bits,
            "ROUND": int(self.planes > self.bits),
            "GROUP": self.group,
            "ZEROS": int(self.format.has_zero_points),
            "BFLOAT": int(self.dtype == torch.bfloat16),
            "SCALE_BFLOAT": int(self.format.scale_dtype == torch.bfloat16),
            "STRETCH": int(4 * self.format.stretch_at(self.bits)),
        }

    def affine(self) -> tuple[float, float, float]:
        """Coefficients (offset, zero_step, gain) of a weight, gain * s * (code + offset - zero_step * zero).

        ``code`` is the first ``bits`` bits of the stored code, with its bits after the fourth times the stretch.
        """
        step = 2.0 ** (self.format.master_bits - self.bits)
        centre = 0.5 if self.format.slicing == "msb" else 0.0
        if (stretch := self.format.stretch_at(self.bits)) != 1:  # cells stretch around the centre of those of four bits
            centre = stretch * centre + (1 - stretch) * self.nibble / 2
        zero = 0.0 if self.format.has_zero_points else self.format.zero_point
        return centre - zero / step, 1 / step, step


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLimits:
    """Properties of a device that decide a launch.

    Attributes:
        shared_bytes: shared memory of a multiprocessor.
        wgmma: True if the device has WGMMA instructions, as sm_90a has.
        clusters: True if the device has thread block clusters, as all have from sm_90 on.
    """

    multiprocessors: int
    shared_bytes: int
    wgmma: bool = False
    clusters: bool = False


def is_supported(shape: GemmShape) -> bool:
    """Return True if the kernels support the shape; torch computes it otherwise, in strips of the dense weight."""
    halves = (torch.float16, torch.bfloat16)
    group = shape.group == 0 or shape.group == TILE // 2 or shape.group % TILE == 0
    return group and shape.dtype in halves and shape.format.scale_dtype in halves


def folds_zero_point_exactly(shape: GemmShape) -> bool:
    """Return True if code, offset and zero point add up exactly in ``dtype``, as the WGMMA kernels require.

    All sums are multiples of a step. They are exact if the largest one is no more steps than the dtype represents before it
    rounds. Where nibbles are multiplied separately, the low one decides: it takes the offset modulo a nibble.
    """
    offset, zero_step, _ = shape.affine()
    has_zeros, stretch = shape.format.has_zero_points, shape.format.stretch_at(shape.bits)
    zero = zero_step * (2**shape.format.master_bits - 1) if has_zeros else 0.0
    digits = 8 if shape.dtype == torch.bfloat16 else 11
    top = stretch * (shape.nibble - 1)  # of the bits after the fourth
    if shape.multiplies_nibbles:
        largest = max(shape.nibble, top + min(max(offset, 0), shape.nibble))
    else:
        largest = max(abs(offset - zero), abs(offset + 2**shape.bits - shape.nibble + top))
    steps = max(number.as_integer_ratio()[1] for number in (offset, stretch, zero_step if has_zeros else 1.0))
    return bool(largest * steps <= 2**digits)
