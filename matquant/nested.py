"""The nested format: codes of M bits whose first b bits are a model of b bits.

A code q of M bits is cut to its first b bits; with d = M - b the two ways of cutting, and what they decode to, are

    msb    c_b(q) = q >> d                                     value = s (2^d (c_b + 1/2) - z)
    round  c_b(q) = min((q >> d) + bit(q, d - 1), 2^b - 1)     value = s (2^d  c_b        - z)

``msb`` is native: it reads exactly b bits, and each slice decodes to the centre of the cell that its codes share. ``round``
is what MatGPTQ v1 (arXiv 2602.03537) does; below M bits it reads one bit more. A scale s of 0 decodes to exactly 0.

The zero point z of symmetric weights is one number for the whole matrix, 2^(M-1) + offset; without symmetry every group has
its own. With an offset the grid reaches further to one side than to the other, and a negative scale turns it round: each
group takes the side that suits it, for no bytes at all. (An offset of 2^(M-5) also puts zero on the grid of 4 bits.)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Slicing = Literal["msb", "round"]


def slice_codes(codes: Tensor, bits: int, master_bits: int, slicing: Slicing) -> Tensor:
    """The first ``bits`` bits of each code: an integer in 0..2^bits - 1, of the dtype and shape of ``codes``."""
    drop = master_bits - bits
    if drop < 0:
        raise ValueError(f"a slice of {bits} bits cannot be cut from codes of {master_bits} bits")
    if drop == 0:
        return codes
    kept = codes >> drop
    if slicing == "msb":
        return kept
    return torch.clamp(kept + ((codes >> (drop - 1)) & 1), max=2**bits - 1)


def levels(bits: int, master_bits: int, slicing: Slicing) -> Tensor:
    """What each code decodes to at ``bits`` bits in units of its scale, before the zero point: float32 [2^master_bits]."""
    codes = torch.arange(2**master_bits)
    centre = 0.5 if slicing == "msb" else 0.0
    return (slice_codes(codes, bits, master_bits, slicing) + centre) * 2.0 ** (master_bits - bits)


def planes_read(bits: int, master_bits: int, slicing: Slicing) -> int:
    """How many bits of each code a slice of ``bits`` bits depends on."""
    return bits if slicing == "msb" else min(bits + 1, master_bits)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedWeight:
    """The weight matrix of one linear layer in the nested format.

    Attributes:
        codes: uint8 [out_features, in_features].
        scales: float16, bfloat16 or float32 [out_features, groups]; negative ones stand for the mirrored grid.
        zeros: uint8 [out_features, groups], or None for symmetric weights.
        master_bits: bits of a code, 2..8.
        slicing: how a width is cut from a code.
        offset: of the zero point of symmetric weights from 2^(master_bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    master_bits: int
    slicing: Slicing
    offset: float = 0.0

    def __post_init__(self) -> None:
        groups = self.scales.shape[1]
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or self.codes.shape[1] % groups:
            raise ValueError(f"codes must be uint8 [out, in] in {groups} equal groups, not {self.codes.shape}")
        if self.scales.shape[0] != self.codes.shape[0] or (
            self.zeros is not None and self.zeros.shape != self.scales.shape
        ):
            raise ValueError("scales and zeros must be [out, groups], with the out of the codes")

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def to(self, device: torch.device | str) -> "NestedWeight":
        """The same with its tensors on that device."""
        return self.with_tensors(lambda tensor: tensor.to(device))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "NestedWeight":
        """The same with each of its tensors changed."""
        zeros = None if self.zeros is None else change(self.zeros)
        return dataclasses.replace(self, codes=change(self.codes), scales=change(self.scales), zeros=zeros)

    def decode(self, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight at ``bits`` bits: [out_features, in_features], computed in float32 and then cast."""
        table = levels(bits, self.master_bits, self.slicing).to(self.codes.device)
        rows, groups = self.scales.shape
        value = table[self.codes.int()].view(rows, groups, -1)
        zero = 2.0 ** (self.master_bits - 1) + self.offset if self.zeros is None else self.zeros.float()[:, :, None]
        return ((value - zero) * self.scales.float()[:, :, None]).view(self.codes.shape).to(dtype)

    def bytes_read(self, bits: int) -> int:
        """Bytes that a runtime reads for this layer at ``bits`` bits: its planes, scales and zero points."""
        planes = planes_read(bits, self.master_bits, self.slicing)
        return math.ceil(self.codes.numel() * planes / 8) + self._bytes_of_groups()

    def _bytes_of_groups(self) -> int:
        return self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        stored = {"codes": self.codes, "scales": self.scales}
        return stored if self.zeros is None else {**stored, "zeros": self.zeros}
