"""Nested format: codes of M bits whose first b bits are a model of b bits.

A code q of M master bits is sliced to its first b bits. With d = M - b, the two kinds of slicing and their values are

    msb    c_b(q) = q >> d                                     value = s (2^d (c_b + 1/2) - z)
    round  c_b(q) = min((q >> d) + bit(q, d - 1), 2^b - 1)     value = s (2^d  c_b        - z)

``msb`` is the native slicing. It reads exactly b bits, and each slice dequantizes to the centre of the cell that its codes
share. ``round`` is the slicing of MatGPTQ v1 (arXiv 2602.03537). Below M bits it reads one bit more. A scale of 0 dequantizes
to exactly 0.

The zero point z of symmetric weights is one constant of the matrix, 2^(M-1) + zero_point_offset; asymmetric weights have a zero
point per group. With an offset the representable range is longer on one side. A negative scale mirrors it, so each group can
take the better orientation at no storage cost. (An offset of 2^(M-5) also puts zero on the 4-bit grid.)

Eight bits need a longer range than four. So the steps of the fifth and later planes of ``msb`` codes may be longer than halves:
with the stretch t, a slice of more than four bits has the value

    value = s (h + t (2^d (c_b + 1/2) - h) - z)                h = centre of the cell of the code's first four bits

and t = 1 for strict halves. Cells of four bits then overlap at higher bit-widths, and a code leaves the cell of its first four
bits. Slices of up to four bits do not depend on t.

A bit-width may have a set of scales of its own, since a low bit-width needs a shorter range than eight bits. All others share
the base set s. A slice reads one set, so it reads as many bytes as without.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from matquant.formats.bits import STRETCHES, STRICT_BITS, check_bits
from matquant.formats.groups import group_count, scale_groups

Slicing = Literal["msb", "round"]
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # by name in files


def slice_codes(codes: Tensor, bits: int, master_bits: int, slicing: Slicing) -> Tensor:
    """First ``bits`` bits of each code: integers in 0..2^bits - 1, of the dtype and shape of ``codes``."""
    drop = master_bits - bits
    if drop < 0:
        raise ValueError(f"a slice of {bits} bits cannot be cut from codes of {master_bits} bits")
    if drop == 0:
        return codes
    kept = codes >> drop
    if slicing == "msb":
        return kept
    return torch.clamp(kept + ((codes >> (drop - 1)) & 1), max=2**bits - 1)


def levels(bits: int, master_bits: int, slicing: Slicing, stretch: float = 1.0) -> Tensor:
    """Value of each code at ``bits`` bits in units of the scale, before the zero point: float32 [2^master_bits]."""
    codes = torch.arange(2**master_bits)
    centre = 0.5 if slicing == "msb" else 0.0
    values = (slice_codes(codes, bits, master_bits, slicing) + centre) * 2.0 ** (master_bits - bits)
    if bits <= STRICT_BITS or stretch == 1:
        return values
    cell = 2 ** (master_bits - STRICT_BITS)
    centres: Tensor = codes // cell * cell + cell / 2
    return centres + stretch * (values - centres)


def planes_read(bits: int, master_bits: int, slicing: Slicing) -> int:
    """Number of bits of each code that a slice of ``bits`` bits depends on."""
    return bits if slicing == "msb" else min(bits + 1, master_bits)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Meaning of the stored codes of one weight matrix.

    Attributes:
        master_bits: bits of a code, 2..8.
        slicing: rule that takes a slice from a code.
        zero_point_offset: offset of the zero point of symmetric weights from 2^(master_bits - 1), in code steps.
        group_size: consecutive input features that share a scale, see ``formats.groups``; all of them for one scale per row.
        has_zero_points: True if every group stores a zero point of its own.
        scale_dtype: one of ``SCALE_DTYPES``.
        scale_bits: bit-widths with a set of scales of their own, ascending; all others share the base set.
        stretch: one of ``formats.bits.STRETCHES``, factor of the steps of the fifth and later planes; 1 for ``round`` slicing.

    Raises:
        ValueError: a stretch that slicing or kernels do not have.
    """

    group_size: int
    master_bits: int = 8
    slicing: Slicing = "msb"
    zero_point_offset: float = 0.0
    has_zero_points: bool = False
    scale_dtype: torch.dtype = torch.float16
    scale_bits: tuple[int, ...] = ()
    stretch: float = 1.0

    def __post_init__(self) -> None:
        if self.stretch not in (STRETCHES if self.slicing == "msb" else STRETCHES[:1]):
            raise ValueError(f"{self.slicing} slices have no stretch of {self.stretch}")

    @classmethod
    def from_op_args(
        cls,
        scales: Tensor,
        zeros: Tensor | None,
        group_size: int,
        master_bits: int,
        slicing: Slicing,
        offset: float,
        stretch: float,
    ) -> "WeightFormat":
        """Format from the flat arguments of a torch operator, which has no dataclasses and reads one set of scales."""
        return cls(
            group_size=group_size,
            master_bits=master_bits,
            slicing=slicing,
            zero_point_offset=offset,
            has_zero_points=zeros is not None,
            scale_dtype=scales.dtype,
            stretch=stretch,
        )

    @property
    def op_args(self) -> tuple[int, int, Slicing, float, float]:
        """Flat arguments of the torch operators: group size, master bits, slicing, zero-point offset, stretch."""
        return self.group_size, self.master_bits, self.slicing, self.zero_point_offset, self.stretch

    @property
    def zero_point(self) -> float:
        """Zero point of symmetric weights, in code steps."""
        return 2.0 ** (self.master_bits - 1) + self.zero_point_offset

    def planes_read(self, bits: int) -> int:
        """Number of bit planes that a slice of ``bits`` bits reads."""
        return planes_read(bits, self.master_bits, self.slicing)

    def max_bits(self, planes: int) -> int:
        """Largest bit-width that the first ``planes`` planes hold: ``round`` needs one more below ``master_bits``."""
        return planes if self.slicing == "msb" or planes == self.master_bits else planes - 1

    def scale_bits_within(self, planes: int) -> tuple[int, ...]:
        """Bit-widths of ``scale_bits`` that the first ``planes`` planes hold."""
        return tuple(bits for bits in self.scale_bits if bits <= self.max_bits(planes))

    def check_bits(self, bits: object, planes: int, name: str = "bits") -> int:
        """Return ``bits`` if the first ``planes`` planes hold that bit-width.

        Args:
            name: setting or layer that the bit-width belongs to, for the message.

        Raises:
            UserError: ``bits`` is no bit-width, or needs more planes.
        """
        found = f"{planes} of {self.master_bits} planes ({self.slicing} slicing)"
        return check_bits(bits, name, self.max_bits(planes), found)

    def levels(self, bits: int) -> Tensor:
        """Value of each code at ``bits`` bits before the zero point, see ``levels``: float32 [2^master_bits]."""
        return levels(bits, self.master_bits, self.slicing, self.stretch)

    def stretch_at(self, bits: int) -> float:
        """Factor of the steps of later planes as far as ``bits`` bits read any."""
        return self.stretch if bits > STRICT_BITS else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedWeight:
    """Weight matrix of one linear layer in the nested format.

    Attributes:
        codes: uint8 [out_features, in_features].
        scales: ``format.scale_dtype`` [out_features, groups], the base set; negative values mirror the grid.
        zeros: uint8 [out_features, groups], or None for symmetric weights.
        format: meaning of the codes.
        own_scales: sets of the bit-widths in ``format.scale_bits``, in the shape and dtype of ``scales``.

    Raises:
        ValueError: shapes or dtypes that do not fit the format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: WeightFormat
    own_scales: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        group_size = self.format.group_size
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or not 1 <= group_size <= self.codes.shape[1]:
            raise ValueError(f"codes must be uint8 [out, in] in groups of {group_size}, not {self.codes.shape}")
        shape = (self.codes.shape[0], group_count(self.codes.shape[1], group_size))
        if self.scales.shape != shape or (self.zeros is not None and self.zeros.shape != shape):
            raise ValueError(f"scales and zeros must be [out, groups] = {list(shape)}, not {list(self.scales.shape)}")
        if (self.zeros is not None, self.scales.dtype) != (self.format.has_zero_points, self.format.scale_dtype):
            raise ValueError("scales and zeros must be of the dtype and kind that the format names")
        if tuple(self.own_scales) != self.format.scale_bits:
            raise ValueError(
                f"scale sets of {list(self.own_scales)} bits, where the format names {self.format.scale_bits}"
            )
        if any((s.shape, s.dtype) != (self.scales.shape, self.scales.dtype) for s in self.own_scales.values()):
            raise ValueError("all sets of scales must have the same shape and dtype")

    @classmethod
    def planned(cls, format: WeightFormat, out_features: int, in_features: int) -> "NestedWeight":
        """Weight of this shape without values, on the meta device, for its size in bytes."""
        groups = group_count(in_features, format.group_size)
        zeros = torch.empty(out_features, groups, dtype=torch.uint8, device="meta") if format.has_zero_points else None
        scales = torch.empty(out_features, groups, dtype=format.scale_dtype, device="meta")
        return cls(
            codes=torch.empty(out_features, in_features, dtype=torch.uint8, device="meta"),
            scales=scales,
            zeros=zeros,
            format=format,
            own_scales=dict.fromkeys(format.scale_bits, scales),
        )

    def scales_at(self, bits: int) -> Tensor:
        """Set of scales that a slice of ``bits`` bits reads: [out_features, groups]."""
        return self.own_scales.get(bits, self.scales)

    def for_bits(self, bits: int) -> "NestedWeight":
        """Weight that has the scales of ``bits`` bits as its only set; its tensors are shared."""
        fmt = dataclasses.replace(self.format, scale_bits=())
        return dataclasses.replace(self, scales=self.scales_at(bits), own_scales={}, format=fmt)

    def to(self, device: torch.device | str) -> "NestedWeight":
        """Copy with all tensors on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "NestedWeight":
        """Copy with ``fn`` applied to each tensor."""
        zeros = None if self.zeros is None else fn(self.zeros)
        own_scales = {bits: fn(scales) for bits, scales in self.own_scales.items()}
        return dataclasses.replace(
            self, codes=fn(self.codes), scales=fn(self.scales), zeros=zeros, own_scales=own_scales
        )

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight [out_features, in_features] at ``bits`` bits, computed in float32 and cast to ``dtype``."""
        table = self.format.levels(bits).to(self.codes.device)
        zero_points = self.format.zero_point if self.zeros is None else self.zeros.float()
        scales = self.scales_at(bits).float()
        dense = scale_groups(table[self.codes.int()], scales, zero_points, self.format.group_size)
        return dense.to(dtype)

    def bytes_read(self, bits: int) -> int:
        """Bytes that a runtime reads for this layer at ``bits`` bits: planes, scales and zero points."""
        side = self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)
        return math.ceil(self.codes.numel() * self.format.planes_read(bits) / 8) + side

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name."""
        stored = {"codes": self.codes, "scales": self.scales}
        stored |= {f"scales{bits}": scales for bits, scales in self.own_scales.items()}
        return stored if self.zeros is None else {**stored, "zeros": self.zeros}
