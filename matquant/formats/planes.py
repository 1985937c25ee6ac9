"""Weight of one linear layer as bit planes: the form that stays in memory and is read at any bit-width."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS, MAX_BITS, MIN_BITS, STRICT_BITS
from matquant.formats.groups import group_count, scale_groups
from matquant.formats.nested import SCALE_DTYPES, NestedWeight, WeightFormat, slice_codes
from matquant.formats.tile_layout import (
    TILE,
    group_shape,
    pack_groups,
    pack_planes,
    plane_shape,
    stored_group_count,
    tiles,
    unpack_groups,
    unpack_planes,
)

CPU_STRIP_WEIGHTS = 2**20  # weights per strip on a CPU: their float32 values about fill a second-level cache
_BYTE = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedPlanes:
    """Bit planes, scales and zero points of a weight [out_features, in_features], in the layout of ``formats.tile_layout``.

    Attributes:
        planes: int32 [planes, row tiles, column tiles, 32, 4], most significant first. The lowest planes may be missing.
        scales: ``format.scale_dtype`` [groups, row tiles, 8, 4, 2], the base set. Padding is 0.
        zeros: uint8, in the shape of ``scales``; None for symmetric weights.
        format: meaning of the codes.
        own_scales: sets of the bit-widths in ``format.scale_bits`` that the planes hold, as ``scales``.

    Raises:
        UserError: shapes, dtypes or devices that do not fit together, or a format that is not supported.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    out_features: int
    in_features: int
    format: WeightFormat
    own_scales: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fmt = self.format
        for scales in (self.scales, *self.own_scales.values()):
            check_layout(self.planes, scales, self.zeros, self.out_features, self.in_features, fmt)
        if missing := set(self.format.scale_bits_within(self.planes.shape[0])) ^ set(self.own_scales):
            raise UserError(f"Scale sets of {sorted(missing)} bits are missing, or are not named by the format.")
        if fmt.master_bits not in BIT_WIDTHS or fmt.slicing not in ("msb", "round"):
            raise UserError(
                f"Codes of {fmt.master_bits} bits with {fmt.slicing!r} slicing are not supported. Codes need {MIN_BITS} to "
                f"{MAX_BITS} bits, and slicing 'msb' or 'round'."
            )
        if self.planes.shape[0] > fmt.master_bits:
            raise UserError(f"{self.planes.shape[0]} planes are more than the {fmt.master_bits} bits of a code.")

    @classmethod
    def pack(cls, weight: NestedWeight, max_bits: int | None = None) -> "NestedPlanes":
        """Pack a weight into planes on its device.

        Args:
            max_bits: largest bit-width to keep the planes of; None keeps all planes.

        Raises:
            UserError: ``max_bits`` is no bit-width of the weight.
        """
        master_bits = weight.format.master_bits
        if max_bits is not None and not MIN_BITS <= max_bits <= master_bits:
            raise UserError(
                f"max_bits={max_bits} is no bit-width of codes of {master_bits} bits. Choose one in {MIN_BITS}..{master_bits}."
            )
        count = master_bits if max_bits is None else weight.format.planes_read(max_bits)
        rows, columns = weight.codes.shape
        planes = weight.codes.new_empty(count, *plane_shape(rows, columns), dtype=torch.int32)
        for strip in _row_strips(rows, columns):
            codes = weight.codes[strip]
            padded = codes.new_zeros(tiles(codes.shape[0]) * TILE, tiles(columns) * TILE)
            padded[: codes.shape[0], :columns] = codes << (_BYTE - master_bits)
            planes[:, strip.start // TILE : tiles(strip.stop)] = pack_planes(padded, count)
        groups = stored_group_count(columns, weight.format.group_size)
        own_scales = {b: pack_groups(weight.own_scales[b], groups) for b in weight.format.scale_bits_within(count)}
        return cls(
            planes=planes,
            scales=pack_groups(weight.scales, groups),
            zeros=None if weight.zeros is None else pack_groups(weight.zeros, groups),
            out_features=rows,
            in_features=columns,
            format=weight.format,
            own_scales=own_scales,
        )

    def scales_at(self, bits: int) -> Tensor:
        """Set of scales that ``bits`` bits read."""
        return self.own_scales.get(bits, self.scales)

    @property
    def max_bits(self) -> int:
        """Largest bit-width that the planes hold."""
        return self.format.max_bits(self.planes.shape[0])

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight [out_features, in_features], bit-identical to ``NestedWeight.dequantize``.

        Raises:
            UserError: the planes do not hold ``bits`` bits.
        """
        dense = self.scales.new_empty(self.out_features, self.in_features, dtype=dtype)
        for strip, values in self.dequantize_strips(bits, dtype):
            dense[strip] = values
        return dense

    def dequantize_strips(
        self, bits: int, dtype: torch.dtype = torch.float32, size: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Dequantize a strip of rows at a time.

        Args:
            size: approximate number of weights per strip; None for ``CPU_STRIP_WEIGHTS``.

        Yields:
            The rows of a strip, and their values [rows, in_features].

        Raises:
            UserError: the planes do not hold ``bits`` bits.
        """
        self.check_bits(bits)
        groups = group_count(self.in_features, self.format.group_size)
        read = self.format.planes_read(bits)
        for strip in _row_strips(self.out_features, self.in_features, size):
            block = slice(strip.start // TILE, tiles(strip.stop))
            rows = strip.stop - strip.start
            values = _code_values(self._codes(strip, read), bits, self.format)
            scales = unpack_groups(self.scales_at(bits)[:, block])[:rows, :groups].float()
            zero_points: Tensor | float = self.format.zero_point
            if self.zeros is not None:
                zero_points = unpack_groups(self.zeros[:, block])[:rows, :groups]
            yield strip, scale_groups(values, scales, zero_points, self.format.group_size).to(dtype)

    def to(self, device: torch.device | str) -> "NestedPlanes":
        """Copy with all tensors on ``device``."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        own_scales = {bits: scales.to(device) for bits, scales in self.own_scales.items()}
        return dataclasses.replace(
            self, planes=self.planes.to(device), scales=self.scales.to(device), zeros=zeros, own_scales=own_scales
        )

    def bytes_read(self, bits: int) -> int:
        """Bytes that a matmul at ``bits`` bits reads of this weight, padding included.

        Raises:
            UserError: the planes do not hold ``bits`` bits.
        """
        self.check_bits(bits)
        read = self.format.planes_read(bits)
        return self.planes[:read].nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def check_bits(self, bits: int) -> None:
        """Check that the planes hold ``bits`` bits. Raises UserError."""
        self.format.check_bits(bits, self.planes.shape[0])

    def _codes(self, strip: slice, count: int) -> Tensor:
        """First ``count`` bits of the codes of a strip, the other bits 0: uint8 [rows, in_features]."""
        planes = self.planes[:count, strip.start // TILE : tiles(strip.stop)]
        codes = unpack_planes(planes)[: strip.stop - strip.start, : self.in_features]
        master_bits = self.format.master_bits
        return codes if master_bits == _BYTE else codes >> (_BYTE - master_bits)


def check_layout(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, in_features: int, fmt: WeightFormat
) -> None:
    """Check shapes, dtypes and devices of the tensors of a packed weight [out_features, in_features]. Raises UserError.

    The weight may be a range of row tiles of a larger one, so that only the first dimension is not contiguous.
    """
    size = fmt.group_size
    if not 1 <= size <= in_features:
        raise UserError(f"The group size of {in_features} input features must lie in 1..{in_features}; found {size}.")
    grid, side = plane_shape(out_features, in_features), group_shape(out_features, in_features, size)
    if planes.dtype != torch.int32 or planes.ndim != 5 or planes.shape[1:] != grid or not holds_row_tiles(planes):
        wanted = f"contiguous int32 [planes, {', '.join(map(str, grid))}]"
        raise UserError(f"Planes of [{out_features}, {in_features}] must be {wanted}; found {_describe(planes)}.")
    if scales.dtype not in SCALE_DTYPES.values() or scales.shape != side or not holds_row_tiles(scales):
        wanted = f"contiguous {', '.join(SCALE_DTYPES)} {list(side)}"
        raise UserError(f"Scales of groups of {size} must be {wanted}; found {_describe(scales)}.")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != side or not holds_row_tiles(zeros)):
        raise UserError(f"Zero points must be contiguous uint8 {list(side)}; found {_describe(zeros)}.")
    if scales.device != planes.device or (zeros is not None and zeros.device != planes.device):
        raise UserError("Planes, scales and zero points must be on one device.")


def read_scales(scales: Sequence[Tensor], scale_bits: Sequence[int], bits: int) -> Tensor:
    """Set of scales that ``bits`` bits read, of a base set followed by one set for each of ``scale_bits``."""
    return scales[scale_bits.index(bits) + 1 if bits in scale_bits else 0]


def holds_row_tiles(tensor: Tensor) -> bool:
    """True if planes, scales or zero points are contiguous, or a range of row tiles of contiguous ones."""
    return tensor.is_contiguous() or (len(tensor) > 0 and tensor[0].is_contiguous())


def _describe(tensor: Tensor) -> str:
    contiguous = "" if tensor.is_contiguous() else "non-contiguous "
    return f"{contiguous}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _code_values(codes: Tensor, bits: int, fmt: WeightFormat) -> Tensor:
    """Values of codes in units of the scale, before the zero point: float32.

    Args:
        codes: codes in which only the bits that a slice of ``bits`` bits reads are set.
    """
    step = 2.0 ** (fmt.master_bits - bits)
    if fmt.slicing == "msb":
        values = codes.float()
        values += step / 2
        if (stretch := fmt.stretch_at(bits)) != 1:
            cell = 2 ** (fmt.master_bits - STRICT_BITS)
            values += (stretch - 1) * ((codes & (cell - 1)).float() + (step - cell) / 2)
        return values
    return slice_codes(codes, bits, fmt.master_bits, fmt.slicing).float() * step


def _row_strips(rows: int, columns: int, size: int | None = None) -> Iterator[slice]:
    """Strips of whole row tiles with about ``size`` weights, by default ``CPU_STRIP_WEIGHTS``."""
    step = max(1, (size or CPU_STRIP_WEIGHTS) // (TILE * max(columns, 1))) * TILE
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
