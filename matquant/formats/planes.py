"""The weight of one linear layer as bit planes: what is kept in memory to be read at any width."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS
from matquant.formats.nested import NestedWeight, WeightFormat, slice_codes
from matquant.formats.tile_layout import TILE, pack_groups, pack_planes, tiles, unpack_groups, unpack_planes

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BYTE = 8
_STRIP = 2**20  # weights that are unpacked at a time: their float32 values fit in a second-level cache or nearly so


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedPlanes:
    """Planes, scales and zero points of a weight [out_features, in_features], in the order of ``formats.tile_layout``.

    Attributes:
        planes: int32 [planes, tiles of rows, tiles of columns, 32, 4], most significant first. Low planes may be missing.
        scales: float16, bfloat16 or float32 [groups, tiles of rows, 8, 4, 2]. Those of rows and groups that fill up tiles
            are 0.
        zeros: uint8, in the shape of ``scales``; None for symmetric weights.
        format: meaning of the codes.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    out_features: int
    in_features: int
    format: WeightFormat

    def __post_init__(self) -> None:
        fmt = self.format
        check_layout(self.planes, self.scales, self.zeros, self.out_features, self.in_features, fmt.group_size)
        if fmt.master_bits not in BIT_WIDTHS or fmt.slicing not in ("msb", "round"):
            raise UserError(
                f"Codes of {fmt.master_bits} bits with {fmt.slicing!r} slicing are not supported: codes have 2 to 8 bits, "
                "and slicing is 'msb' or 'round'."
            )
        if self.planes.shape[0] > fmt.master_bits:
            raise UserError(f"{self.planes.shape[0]} planes are more than the {fmt.master_bits} bits of a code.")

    @classmethod
    def pack(cls, weight: NestedWeight, max_bits: int | None = None) -> "NestedPlanes":
        """The planes of a weight, on its device.

        Args:
            max_bits: keep what widths up to this one need, and no more; None keeps all.

        Raises:
            UserError: ``max_bits`` is no width of the weight.
        """
        master = weight.format.master_bits
        if max_bits is not None and not BIT_WIDTHS.start <= max_bits <= master:
            raise UserError(f"max_bits={max_bits} is no width of codes of {master} bits. Give one in 2..{master}.")
        count = master if max_bits is None else weight.format.planes_read(max_bits)
        rows, columns = weight.codes.shape
        planes = weight.codes.new_empty(count, tiles(rows), tiles(columns), 32, 4, dtype=torch.int32)
        for strip in _strips(rows, columns):
            codes = weight.codes[strip]
            padded = codes.new_zeros(tiles(codes.shape[0]) * TILE, tiles(columns) * TILE)
            padded[: codes.shape[0], :columns] = codes << (_BYTE - master)
            planes[:, strip.start // TILE : tiles(strip.stop)] = pack_planes(padded, count)
        groups = group_count(columns, weight.format.group_size)
        return cls(
            planes=planes,
            scales=pack_groups(weight.scales, groups),
            zeros=None if weight.zeros is None else pack_groups(weight.zeros, groups),
            out_features=rows,
            in_features=columns,
            format=weight.format,
        )

    @property
    def max_bits(self) -> int:
        """The largest width that the planes allow."""
        return self.format.max_bits(self.planes.shape[0])

    def unpack(self) -> NestedWeight:
        """The codes again. Bits of planes that are not there are 0."""
        codes = self.planes.new_empty(self.out_features, self.in_features, dtype=torch.uint8)
        for strip in _strips(self.out_features, self.in_features):
            codes[strip] = self._codes(strip, self.planes.shape[0])
        groups = self.in_features // self.format.group_size
        return NestedWeight(
            codes=codes,
            scales=unpack_groups(self.scales)[: self.out_features, :groups].contiguous(),
            zeros=None if self.zeros is None else unpack_groups(self.zeros)[: self.out_features, :groups].contiguous(),
            format=self.format,
        )

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features], the same to the bit as ``NestedWeight.dequantize``.

        Raises:
            UserError: the planes of that width are not there.
        """
        dense = self.scales.new_empty(self.out_features, self.in_features, dtype=dtype)
        for strip, values in self.dequantize_strips(bits, dtype):
            dense[strip] = values
        return dense

    def dequantize_strips(
        self, bits: int, dtype: torch.dtype = torch.float32, size: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The dense weight a few rows at a time: the rows, and their values [rows, in_features]. Raises as ``dequantize`` does.

        Args:
            size: weights in a strip, about; None is what suits a CPU.
        """
        self.check_bits(bits)
        groups = self.in_features // self.format.group_size
        read = self.format.planes_read(bits)
        for strip in _strips(self.out_features, self.in_features, size):
            block = slice(strip.start // TILE, tiles(strip.stop))
            rows = strip.stop - strip.start
            codes = self._codes(strip, read)
            values = _units(codes, bits, self.format).view(rows, groups, -1)
            scales = unpack_groups(self.scales[:, block])[:rows, :groups, None].float()
            if self.zeros is None:
                values -= self.format.zero_point
            else:
                values -= unpack_groups(self.zeros[:, block])[:rows, :groups, None]
            values *= scales
            yield strip, values.view(rows, -1).to(dtype)

    def to(self, device: torch.device | str) -> "NestedPlanes":
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return dataclasses.replace(self, planes=self.planes.to(device), scales=self.scales.to(device), zeros=zeros)

    def bytes_read(self, bits: int) -> int:
        """Bytes that a matmul at ``bits`` bits reads of this weight, those that fill up tiles included.

        Raises:
            UserError: the planes of that width are not there.
        """
        self.check_bits(bits)
        read = self.format.planes_read(bits)
        return self.planes[:read].nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def check_bits(self, bits: int) -> None:
        """Raises UserError if the planes of that width are not there."""
        check_bits(bits, self.planes.shape[0], self.format)

    def _codes(self, strip: slice, count: int) -> Tensor:
        """The first ``count`` bits of the codes of some rows, the rest 0: uint8 [rows, in_features]."""
        planes = self.planes[:count, strip.start // TILE : tiles(strip.stop)]
        codes = unpack_planes(planes)[: strip.stop - strip.start, : self.in_features]
        master = self.format.master_bits
        return codes if master == _BYTE else codes >> (_BYTE - master)


def group_count(in_features: int, group_size: int) -> int:
    """How many groups are stored for a row: one when it is one group, else as many as its tiles reach into."""
    return 1 if group_size == in_features else math.ceil(tiles(in_features) * TILE / group_size)


def check_bits(bits: int, planes: int, fmt: WeightFormat) -> None:
    """Raises UserError unless ``bits`` is a width that the first ``planes`` planes allow."""
    most = fmt.max_bits(planes)
    if not isinstance(bits, int) or bits not in BIT_WIDTHS or bits > fmt.master_bits:
        raise UserError(f"A bit-width must be a whole number in 2..{fmt.master_bits} bits; found {bits!r}.")
    if bits > most:
        raise UserError(
            f"{bits} bits cannot be read: of the {fmt.master_bits} planes the first {planes} are here, which is enough for "
            f"{most} bits ({fmt.slicing} slices). Give a smaller width, or load the weights with more planes."
        )


def check_layout(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, in_features: int, group_size: int
) -> None:
    """Raises UserError unless planes, scales and zero points have the shapes and dtypes of such a weight."""
    grid = (tiles(out_features), tiles(in_features), 32, 4)
    if group_size < 1 or in_features % group_size:
        raise UserError(f"Groups of {group_size} do not divide {in_features} input features.")
    side = (group_count(in_features, group_size), grid[0], 8, 4, 2)
    if planes.dtype != torch.int32 or planes.ndim != 5 or planes.shape[1:] != grid or not planes.is_contiguous():
        wanted = f"contiguous int32 [planes, {', '.join(map(str, grid))}]"
        raise UserError(f"Planes of [{out_features}, {in_features}] are {wanted}; found {_describe(planes)}.")
    if scales.dtype not in SCALE_DTYPES or scales.shape != side or not scales.is_contiguous():
        wanted = f"contiguous float16, bfloat16 or float32 {list(side)}"
        raise UserError(f"Scales of groups of {group_size} are {wanted}; found {_describe(scales)}.")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != side or not zeros.is_contiguous()):
        raise UserError(f"Zero points are contiguous uint8 {list(side)}; found {_describe(zeros)}.")
    if scales.device != planes.device or (zeros is not None and zeros.device != planes.device):
        raise UserError("Planes, scales and zero points must lie on one device.")


def _describe(tensor: Tensor) -> str:
    contiguous = "" if tensor.is_contiguous() else "not contiguous "
    return f"{contiguous}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _units(codes: Tensor, bits: int, fmt: WeightFormat) -> Tensor:
    """What codes, of which only the bits that ``bits`` needs are set, decode to in units of the scale: float32."""
    step = 2.0 ** (fmt.master_bits - bits)
    if fmt.slicing == "msb":
        values = codes.float()
        values += step / 2
        return values
    return slice_codes(codes, bits, fmt.master_bits, fmt.slicing).float() * step


def _strips(rows: int, columns: int, size: int | None = None) -> Iterator[slice]:
    """Rows in portions of whole tiles and of about ``size`` weights, or ``_STRIP``."""
    step = max(1, (size or _STRIP) // (TILE * max(columns, 1))) * TILE
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
