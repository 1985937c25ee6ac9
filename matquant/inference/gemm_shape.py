"""A product with bit planes, as far as it decides how the kernels are compiled and launched."""

import dataclasses

import torch

from matquant.formats.nested import WeightFormat
from matquant.formats.tile_layout import TILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a launch depends on but the tensors' addresses.

    Attributes:
        tokens, rows, depth: M, N and K of y[M, N] = x[M, K] W[N, K]^T.
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
        """The macro GROUP: 0 for one scale per row."""
        return 0 if self.format.group_size == self.depth else self.format.group_size

    @property
    def planes(self) -> int:
        return self.format.planes_read(self.bits)

    def defines(self) -> dict[str, int]:
        """The macros that both kernels share."""
        return {
            "BITS": self.bits,
            "ROUND": int(self.planes > self.bits),
            "GROUP": self.group,
            "ZEROS": int(self.format.has_zero_points),
            "BFLOAT": int(self.dtype == torch.bfloat16),
            "SCALE_BFLOAT": int(self.format.scale_dtype == torch.bfloat16),
        }

    def affine(self) -> tuple[float, float, float]:
        """(offset, zero_step, gain): a weight is gain * s * (code + offset - zero_step * zero), ``code`` its first bits."""
        step = 2.0 ** (self.format.master_bits - self.bits)
        centre = 0.5 if self.format.slicing == "msb" else 0.0
        zero = 0.0 if self.format.has_zero_points else self.format.zero_point
        return centre - zero / step, 1 / step, step


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a plan needs to know of a device.

    Attributes:
        shared_bytes: of shared memory on a multiprocessor.
        wgmma: whether it has the instructions of that name, as sm_90a alone does.
    """

    multiprocessors: int
    shared_bytes: int
    wgmma: bool = False


def supported(problem: Problem) -> bool:
    """Whether the kernels take the problem; torch computes it otherwise, in strips."""
    halves = (torch.float16, torch.bfloat16)
    group = problem.group == 0 or problem.group == TILE // 2 or problem.group % TILE == 0
    return group and problem.dtype in halves and problem.format.scale_dtype in halves


def centred_exactly(problem: Problem) -> bool:
    """Whether a code stays exact in ``dtype`` when offset and zero point are added to it, as ``gemm_wgmma.cuh`` does.

    All sums are multiples of a step; they fit if the largest is no more steps than the dtype has numbers before it rounds.
    For bfloat16's codes of 8 bits, of which each nibble is multiplied by itself, that is asked of the low one.
    """
    offset, zero_step, _ = problem.affine()
    zero = zero_step * (2**problem.format.master_bits - 1) if problem.format.has_zero_points else 0.0
    digits = 8 if problem.dtype == torch.bfloat16 else 11
    largest = max(abs(offset - zero), abs(offset + 2**problem.bits - 1))
    if problem.dtype == torch.bfloat16 and problem.bits == 8:
        largest = 2 * 2**4
    steps = max(offset.as_integer_ratio()[1], zero_step.as_integer_ratio()[1] if problem.format.has_zero_points else 1)
    return largest * steps <= 2**digits
