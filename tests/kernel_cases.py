"""Products by ``kernels/gemm.cu`` and ``gemm_sm90_ws.cu`` on the stand-in: variants, cases, and the exact result."""

import ctypes
import dataclasses

import torch
from standin import Argument, TensorMap, compile_kernel, read_source
from torch import Tensor

from matquant.cuda.tma import TmaDescriptor
from matquant.formats.nested import NestedWeight, Slicing, WeightFormat, planes_read
from matquant.formats.tile_layout import pack_groups, pack_planes, tiles

POISON = -1  # of planes that must not be read: all bits set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A compiled kernel: its macros."""

    bits: int = 4
    group: int = 128
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float16
    slicing: Slicing = "msb"
    zeros: bool = False
    token_tiles: int = 1
    row_warps: int = 1
    k_warps: int = 1
    tile_warps: int = 1
    units: int = 2
    stages: int = 3
    panel: int = 2
    wgmma: bool = False
    many: bool = False  # by kernels/gemm_sm90_ws.cu

    def defines(self) -> dict[str, int]:
        return {
            "BITS": self.bits,
            "ROUND": int(self.slicing == "round"),
            "GROUP": max(self.group, 0),
            "ZEROS": int(self.zeros),
            "BFLOAT": int(self.dtype == torch.bfloat16),
            "SCALE_BFLOAT": int(self.scale_dtype == torch.bfloat16),
            "TOKEN_TILES": self.token_tiles,
            "ROW_WARPS": self.row_warps,
            "K_WARPS": self.k_warps,
            "TILE_WARPS": self.tile_warps,
            "UNITS": self.units,
            "STAGES": self.stages,
            "PANEL": self.panel,
            "WGMMA": int(self.wgmma),
            "SHARED_BYTES": self.shared_bytes(),
            "BLOCKS_PER_SM": 1,
        }

    @property
    def warps(self) -> int:
        return self.row_warps * self.k_warps * self.tile_warps

    def shared_bytes(self) -> int:
        """``sizeof(Shared)`` of the source."""
        columns = 64 * self.units
        groups = columns // min(self.group if self.group > 0 else columns, columns)
        planes = planes_read(self.bits, 8, self.slicing)
        weights = self.units * planes * 512 + groups * 128 + self.zeros * groups * 64
        tokens = 8 * self.token_tiles
        if self.many:
            total = self.stages * (self.row_warps * weights + columns * tokens * 2 + 16)
            return -(-total // 1024) * 1024
        panels = 1 + -(-(self.stages - 1) // self.panel)
        x = panels * self.panel * tokens * (columns * self.k_warps + 8 * (not self.wgmma)) * 2
        x_sums = self.panel * self.k_warps * groups * tokens * 4
        total = self.k_warps * self.row_warps * self.stages * weights + x
        total += -(-8 * panels // 16) * 16 if self.wgmma else x_sums
        if self.k_warps > 1:
            total += self.warps * 4 // self.tile_warps * self.token_tiles * 512
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product."""

    tokens: int = 1
    rows: int = 128
    depth: int = 256
    blocks: int = 1
    bias: bool = False
    master_bits: int = 8
    offset: float = 8.0
    mean: float = 0.5
    seed: int = 0


def make_weight(variant: Variant, case: Case) -> NestedWeight:
    g = torch.Generator().manual_seed(case.seed)
    group = variant.group if variant.group > 0 else case.depth
    shape = (case.rows, case.depth // group)
    codes = torch.randint(0, 2**case.master_bits, (case.rows, case.depth), generator=g, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=g) * 0.02 + 0.001) * torch.randint(0, 2, shape, generator=g).mul(2).sub(1)
    zeros = torch.randint(0, 2**case.master_bits, shape, generator=g, dtype=torch.uint8) if variant.zeros else None
    return NestedWeight(
        codes=codes,
        scales=scales.to(variant.scale_dtype),
        zeros=zeros,
        format=WeightFormat(
            master_bits=case.master_bits,
            slicing=variant.slicing,
            zero_point_offset=case.offset,
            group_size=group,
            has_zero_points=variant.zeros,
            scale_dtype=variant.scale_dtype,
        ),
    )


def packed(variant: Variant, case: Case, weight: NestedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Planes, scales and zero points as the kernel takes them; planes that it must not read are poisoned."""
    padded = torch.zeros(tiles(case.rows) * 64, tiles(case.depth) * 64, dtype=torch.uint8)
    padded[: case.rows, : case.depth] = weight.codes << (8 - case.master_bits)
    planes = pack_planes(padded, 8)
    planes[planes_read(variant.bits, case.master_bits, variant.slicing) :] = POISON
    groups = -(-tiles(case.depth) * 64 // variant.group) if variant.group > 0 else 1
    zeros = None if weight.zeros is None else pack_groups(weight.zeros, groups)
    return planes, pack_groups(weight.scales, groups), zeros


def inputs(variant: Variant, case: Case) -> tuple[Tensor, Tensor | None]:
    """ActivationCache whose mean is not zero and whose tails are heavy, and the bias."""
    g = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(case.tokens, case.depth, generator=g) + case.mean
    x[:, 7::97] *= 10
    bias = torch.randn(case.rows, generator=g).to(variant.dtype) if case.bias else None
    return x.to(variant.dtype), bias


def run(
    variant: Variant,
    case: Case,
    *,
    source: str | None = None,
    sanitize: bool = False,
    launches: int = 1,
    order: int | None = None,
    dead_groups: bool = False,
):
    """(y of the kernel, y in float64, y as good as can be). The workspace, y and all planes that must not be read are poisoned.

    As good as can be is the exact result rounded to the output's dtype; for ``gemm_sm90_ws.cu`` what a dense matrix gives.

    Args:
        launches: one after the other, with the same workspace and tickets.
        order: of threads and blocks; None for the case's seed.
        dead_groups: every third group has a scale of 0, in each row another one.
    """
    weight = make_weight(variant, case)
    if dead_groups:
        rows, groups = weight.scales.shape
        weight.scales[(torch.arange(rows)[:, None] + torch.arange(groups)) % 3 == 0] = 0
    x, bias = inputs(variant, case)
    up = 8 - case.master_bits
    planes, scales, zeros = packed(variant, case, weight)
    token_tiles = -(-case.tokens // (8 * variant.token_tiles))
    row_tiles = -(-tiles(case.rows) // variant.row_warps) * token_tiles
    chunks = -(-tiles(case.depth) // (variant.units * variant.k_warps))
    blocks = min(case.blocks, row_tiles * chunks)
    y = torch.full((case.tokens, case.rows), torch.nan).to(variant.dtype)
    shared_out = row_tiles % blocks if variant.many else row_tiles
    workspace = torch.full(((blocks + shared_out) * variant.row_warps * 64 * 8 * variant.token_tiles,), torch.nan)
    tickets = torch.zeros(shared_out * variant.warps, dtype=torch.int32)
    step, centre = 2.0 ** (8 - variant.bits), 0.5 if variant.slicing == "msb" else 0.0
    zero = 0.0 if variant.zeros else (2.0 ** (case.master_bits - 1) + case.offset) * 2.0**up
    name, function = ("gemm_sm90_ws.cu", "nested_gemm_sm90_ws") if variant.many else ("gemm.cu", "nested_gemm")
    kernel = compile_kernel(source or read_source(name), function, variant.defines(), sanitize=sanitize)
    arrays = array_arguments(variant, planes, scales, zeros, x)
    for _ in range(launches):
        kernel.launch(
            (blocks,),
            (32 * variant.warps + 128 * variant.many,),
            [
                *arrays,
                None if bias is None else bias.view(torch.int16),
                y.view(torch.int16),
                workspace,
                tickets,
                case.tokens,
                case.rows,
                case.depth,
                centre - zero / step,
                2.0**up / step,
                step / 2.0**up,
            ],
            shared_bytes=variant.shared_bytes(),
            seed=case.seed if order is None else order,
        )
    assert not tickets.any(), "tickets are not reset"
    dense = exact_weight(weight, variant.bits)
    exact, by_dense = (
        x.double() @ values.double().T + (0 if bias is None else bias.double())
        for values in (dense, dense.to(variant.dtype))
    )
    return y, exact, (by_dense if variant.many else exact).to(variant.dtype)


def array_arguments(
    variant: Variant, planes: Tensor, scales: Tensor, zeros: Tensor | None, x: Tensor
) -> list[Argument]:
    """Planes, scales, zero points and x as the kernel takes them."""
    x_map = TensorMap(x, TmaDescriptor(2, tuple(x.shape), (8 * variant.token_tiles, 64), turned=True))
    if variant.many:
        return [*weight_maps(variant, planes, scales, zeros), x_map]
    stride = ctypes.c_uint64(planes[0].numel() // 4)
    return [planes, stride, scales.view(torch.int16), zeros, x_map if variant.wgmma else x.view(torch.int16)]


def weight_maps(variant: Variant, planes: Tensor, scales: Tensor, zeros: Tensor | None) -> list[Argument]:
    """Planes, scales and zero points for ``kernels/gemm_sm90_ws.cu``, as arrays of 8-byte elements."""
    rows, units, columns = planes.shape[1], planes.shape[2], 64 * variant.units
    groups = columns // min(variant.group if variant.group > 0 else columns, columns)
    read = planes_read(variant.bits, 8, variant.slicing)
    tiling = TmaDescriptor(8, (read, rows, 64 * units), (read, variant.row_warps, 64 * variant.units))
    of_groups = [TmaDescriptor(8, (scales.shape[0], n * rows), (groups, n * variant.row_warps)) for n in (16, 8)]
    return [
        TensorMap(planes, tiling),
        TensorMap(scales, of_groups[0]),
        None if zeros is None else TensorMap(zeros, of_groups[1]),
    ]


def exact_weight(weight: NestedWeight, bits: int) -> Tensor:
    """The dense weight at ``bits`` bits in float64, straight from the format's formula."""
    drop = weight.format.master_bits - bits
    codes = weight.codes.double()
    if weight.format.slicing == "msb":
        value = (torch.floor(codes / 2**drop) + 0.5) * 2**drop
    else:
        value = torch.clamp(torch.floor(codes / 2**drop + 0.5), max=2**bits - 1) * 2**drop
    rows, groups = weight.scales.shape
    zero = (
        2 ** (weight.format.master_bits - 1) + weight.format.zero_point_offset
        if weight.zeros is None
        else weight.zeros.double()[:, :, None]
    )
    return ((value.view(rows, groups, -1) - zero) * weight.scales.double()[:, :, None]).view(weight.codes.shape)


def error_ratio(y: Tensor, exact: Tensor, best: Tensor) -> float:
    """How far y is from the exact result, as a multiple of how far the best is."""
    made, unavoidable = (torch.linalg.norm(values.double() - exact) for values in (y, best))
    return (made / unavoidable).item()
