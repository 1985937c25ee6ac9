"""A product with bit planes, as far as it decides how the kernels are compiled and launched."""

import dataclasses

import torch

from matquant.inference.layout import TILE
from matquant.nested import Slicing, planes_read


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a launch depends on but the tensors' addresses.

    Attributes:
        tokens, rows, depth: M, N and K of y[M, N] = x[M, K] W[N, K]^T.
        group_size: K for one scale per row.
        dtype: of x, bias and y: float16 or bfloat16.
        scale_dtype: likewise.
    """

    tokens: int
    rows: int
    depth: int
    bits: int
    group_size: int
    zeros: bool
    dtype: torch.dtype
    scale_dtype: torch.dtype
    master_bits: int = 8
    slicing: Slicing = "msb"
    offset: float = 0.0

    @property
    def group(self) -> int:
        """The macro GROUP: 0 for one scale per row."""
        return 0 if self.group_size == self.depth else self.group_size

    @property
    def planes(self) -> int:
        return planes_read(self.bits, self.master_bits, self.slicing)

    def defines(self) -> dict[str, int]:
        """The macros that both kernels share."""
        return {
            "BITS": self.bits,
            "ROUND": int(self.planes > self.bits),
            "GROUP": self.group,
            "ZEROS": int(self.zeros),
            "BFLOAT": int(self.dtype == torch.bfloat16),
            "SCALE_BFLOAT": int(self.scale_dtype == torch.bfloat16),
        }

    def affine(self) -> tuple[float, float, float]:
        """(offset, zero_step, gain): a weight is gain * s * (code + offset - zero_step * zero), ``code`` its first bits."""
        step = 2.0 ** (self.master_bits - self.bits)
        centre = 0.5 if self.slicing == "msb" else 0.0
        zero = 0.0 if self.zeros else 2.0 ** (self.master_bits - 1) + self.offset
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
    return group and problem.dtype in halves and problem.scale_dtype in halves


def centred_exactly(problem: Problem) -> bool:
    """Whether a code stays exact in ``dtype`` when offset and zero point are added to it, as ``gemm_wgmma.cuh`` does.

    All sums are multiples of a step; they fit if the largest is no more steps than the dtype has numbers before it rounds.
    For bfloat16's codes of 8 bits, of which each nibble is multiplied by itself, that is asked of the low one.
    """
    offset, zero_step, _ = problem.affine()
    zero = zero_step * (2**problem.master_bits - 1) if problem.zeros else 0.0
    digits = 8 if problem.dtype == torch.bfloat16 else 11
    largest = max(abs(offset - zero), abs(offset + 2**problem.bits - 1))
    if problem.dtype == torch.bfloat16 and problem.bits == 8:
        largest = 2 * 2**4
    steps = max(offset.as_integer_ratio()[1], zero_step.as_integer_ratio()[1] if problem.zeros else 1)
    return largest * steps <= 2**digits
