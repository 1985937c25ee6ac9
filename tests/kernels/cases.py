"""GEMM launches on the emulator: kernel configurations, problems, inputs, and the exact result."""

import ctypes
import dataclasses
from typing import Literal

import torch
from torch import Tensor

from matquant.cuda.tma import TmaDescriptor
from matquant.formats.nested import NestedWeight, Slicing, WeightFormat, planes_read
from matquant.formats.tile_layout import pack_groups, pack_planes, tiles
from tests.kernels.emulator import Argument, TensorMap, compile_kernel, read_source

POISON = -1  # int32 words of planes that a kernel must not read: all bits set

Family = Literal["mma", "wgmma", "wgmma_ws"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Compile-time configuration of a GEMM kernel; the macros are documented in ``kernels/gemm.cu``.

    Attributes:
        group_size: -1 for one scale per row.
        family: ``mma`` and ``wgmma`` are the mainloops of ``gemm.cu``; ``wgmma_ws`` is ``gemm_sm90_ws.cu``.
    """

    bits: int = 4
    group_size: int = 128
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float16
    slicing: Slicing = "msb"
    has_zero_points: bool = False
    stretch: float = 1.0
    block_m: int = 8
    block_n: int = 64
    block_k: int = 128
    row_block_warps: int = 1
    warps_k: int = 1
    stages: int = 3
    x_stage_tiles: int = 2
    cluster: int = 1
    x_rows: int = 0
    whole_tiles: bool = False
    family: Family = "mma"

    def format_defines(self) -> dict[str, int]:
        """Macros shared by all kernels that read bit planes."""
        return {
            "BITS": self.bits,
            "ROUND": int(self.slicing == "round"),
            "GROUP": max(self.group_size, 0),
            "ZEROS": int(self.has_zero_points),
            "BFLOAT": int(self.dtype == torch.bfloat16),
            "SCALE_BFLOAT": int(self.scale_dtype == torch.bfloat16),
            "STRETCH": int(4 * self.stretch) if self.bits > 4 else 4,
        }

    def defines(self) -> dict[str, int]:
        """Macros of a GEMM kernel."""
        return self.format_defines() | {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "ROW_BLOCK_WARPS": self.row_block_warps,
            "WARPS_K": self.warps_k,
            "STAGES": self.stages,
            "X_STAGE_TILES": self.x_stage_tiles,
            "WGMMA": int(self.family != "mma"),
            "CLUSTER": self.cluster,
            "WHOLE_TILES": int(self.whole_tiles),
            **({"X_ROWS": self.x_rows} if self.x_rows else {}),
            "SHARED_BYTES": self.shared_bytes(),
            "BLOCKS_PER_SM": 1,
        }

    @property
    def source_name(self) -> str:
        return "gemm_sm90_ws.cu" if self.family == "wgmma_ws" else "gemm.cu"

    @property
    def function(self) -> str:
        return "nested_gemm_sm90_ws" if self.family == "wgmma_ws" else "nested_gemm"

    @property
    def token_tiles(self) -> int:
        return self.block_m // 8

    @property
    def row_blocks(self) -> int:
        return self.block_n // 64

    @property
    def groups_per_k_tile(self) -> int:
        return self.block_k // min(self.group_size if self.group_size > 0 else self.block_k, self.block_k)

    @property
    def warps(self) -> int:
        """Number of MMA warps."""
        return self.row_blocks * self.warps_k * self.row_block_warps

    @property
    def threads(self) -> int:
        return 32 * self.warps + (128 if self.family == "wgmma_ws" else 0)

    def cluster_sums_bytes(self) -> int:
        """Size of the partial sums from the blocks of a cluster."""
        shares = -(-4 // self.row_block_warps * self.token_tiles // self.cluster)
        return self.cluster * self.row_blocks * self.row_block_warps * shares * 512 if self.cluster > 1 else 0

    def shared_bytes(self) -> int:
        """Size of the kernel's shared storage in bytes; the kernel asserts the same number."""
        groups = self.groups_per_k_tile
        planes = planes_read(self.bits, 8, self.slicing)
        weights = self.block_k // 64 * planes * 512 + groups * 128 + self.has_zero_points * groups * 64
        if self.family == "wgmma_ws":
            stages = self.stages * (-(-self.row_blocks * weights // 128) * 128 + self.block_k * self.block_m * 2)
            barriers = 2 * self.stages + (self.cluster > 1)
            return -(-(max(stages, self.cluster_sums_bytes()) + 8 * barriers) // 128) * 128
        wgmma = self.family == "wgmma"
        x_stages = 1 + -(-(self.stages - 1) // self.x_stage_tiles)
        x = (
            x_stages
            * self.x_stage_tiles
            * (self.x_rows or self.block_m)
            * (self.block_k * self.warps_k + 8 * (not wgmma))
            * 2
        )
        own_sums = self.token_tiles * self.row_block_warps <= 2
        x_sums = 0 if own_sums else self.x_stage_tiles * self.warps_k * groups * self.block_m * 4
        total = self.warps_k * self.row_blocks * self.stages * weights + x
        if self.warps_k > 1:
            total += self.warps * 4 // self.row_block_warps * self.token_tiles * 512
        total += self.cluster_sums_bytes() + 16 * (self.cluster > 1)
        return total + (-(-8 * x_stages // 16) * 16 if wgmma else x_sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmCase:
    """GEMM problem with random inputs, and the grid size.

    Attributes:
        tokens, rows, depth: M, N and K.
        blocks: grid size; reduced to the number of k-tiles if larger. Without meaning in clusters.
        offset: zero-point offset of the weight format.
        mean: mean of x.
        seed: of the inputs, and by default of the schedule.
        before, after: row tiles of a larger stored weight that this one is a part of.
    """

    tokens: int = 1
    rows: int = 128
    depth: int = 256
    blocks: int = 1
    bias: bool = False
    master_bits: int = 8
    offset: float = 8.0
    mean: float = 0.5
    seed: int = 0
    before: int = 0
    after: int = 0


@dataclasses.dataclass(frozen=True)
class GemmResult:
    """Output of a kernel, the float64 result, and the best result that its dtype allows.

    Attributes:
        best: the exact result rounded to the output dtype; for ``wgmma_ws``, the result of a dense matrix in that dtype.
    """

    y: Tensor
    exact: Tensor
    best: Tensor

    def error_ratio(self) -> float:
        """Error norm of ``y`` as a multiple of the error norm of ``best``."""
        error, unavoidable = (torch.linalg.norm(values.double() - self.exact) for values in (self.y, self.best))
        return (error / unavoidable).item()


def make_weight(config: GemmConfig, case: GemmCase) -> NestedWeight:
    """Random codes, scales of both signs, and zero points."""
    g = torch.Generator().manual_seed(case.seed)
    group = config.group_size if config.group_size > 0 else case.depth
    shape = (case.rows, -(-case.depth // group))
    codes = torch.randint(0, 2**case.master_bits, (case.rows, case.depth), generator=g, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=g) * 0.02 + 0.001) * torch.randint(0, 2, shape, generator=g).mul(2).sub(1)
    zeros = None
    if config.has_zero_points:
        zeros = torch.randint(0, 2**case.master_bits, shape, generator=g, dtype=torch.uint8)
    return NestedWeight(
        codes=codes,
        scales=scales.to(config.scale_dtype),
        zeros=zeros,
        format=WeightFormat(
            master_bits=case.master_bits,
            slicing=config.slicing,
            zero_point_offset=case.offset,
            group_size=group,
            has_zero_points=config.has_zero_points,
            scale_dtype=config.scale_dtype,
            stretch=config.stretch,
        ),
    )


def pack(config: GemmConfig, case: GemmCase, weight: NestedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Planes, scales and zero points in the kernels' layout. Planes that must not be read are poisoned."""
    padded = torch.zeros(tiles(case.rows) * 64, tiles(case.depth) * 64, dtype=torch.uint8)
    padded[: case.rows, : case.depth] = weight.codes << (8 - case.master_bits)
    planes = pack_planes(padded, 8)
    planes[planes_read(config.bits, case.master_bits, config.slicing) :] = POISON
    groups = -(-tiles(case.depth) * 64 // config.group_size) if config.group_size > 0 else 1
    zeros = None if weight.zeros is None else pack_groups(weight.zeros, groups)
    return planes, pack_groups(weight.scales, groups), zeros


def within_larger(
    case: GemmCase, planes: Tensor, scales: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight as a range of row tiles of a larger one, whose other tiles are poisoned."""
    if not case.before and not case.after:
        return planes, scales, zeros

    def part(tensor: Tensor, poison: float) -> Tensor:
        padding = [
            tensor.new_full((len(tensor), count, *tensor.shape[2:]), poison) for count in (case.before, case.after)
        ]
        return torch.cat([padding[0], tensor, padding[1]], 1)[:, case.before : case.before + tensor.shape[1]]

    return part(planes, POISON), part(scales, torch.nan), None if zeros is None else part(zeros, 255)


def make_inputs(config: GemmConfig, case: GemmCase) -> tuple[Tensor, Tensor | None]:
    """Activations with a nonzero mean and outliers, and the bias."""
    g = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(case.tokens, case.depth, generator=g) + case.mean
    x[:, 7::97] *= 10
    bias = torch.randn(case.rows, generator=g).to(config.dtype) if case.bias else None
    return x.to(config.dtype), bias


def affine(config: GemmConfig, case: GemmCase, code_bits: int) -> tuple[float, float, float]:
    """Kernel arguments (offset, zero_step, gain) for slices of codes of ``code_bits`` bits."""
    up = code_bits - case.master_bits
    step, centre = 2.0 ** (code_bits - config.bits), 0.5 if config.slicing == "msb" else 0.0
    if config.bits > 4:
        centre += (config.stretch - 1) * (centre - 2.0 ** (config.bits - 5))
    zero = 0.0 if config.has_zero_points else (2.0 ** (case.master_bits - 1) + case.offset) * 2.0**up
    return centre - zero / step, 2.0**up / step, step / 2.0**up


def run(
    config: GemmConfig,
    case: GemmCase,
    *,
    source: str | None = None,
    sanitize: bool = False,
    launches: int = 1,
    order: int | None = None,
    zero_scales: bool = False,
) -> GemmResult:
    """Run a GEMM kernel on the emulator. The workspace, y, and planes that must not be read are poisoned.

    Args:
        source: kernel source; the default is the configuration's file.
        sanitize: run under the address sanitizer.
        launches: number of consecutive launches with the same workspace and semaphores.
        order: seed of the schedule; the default is the case's seed.
        zero_scales: set the scales of every third group to 0, in each row different groups.

    Raises:
        EmulatorError: The emulator detected an error in the kernel.
        AssertionError: Tile semaphores are not 0 after the launch.
    """
    weight = make_weight(config, case)
    if zero_scales:
        rows, groups = weight.scales.shape
        weight.scales[(torch.arange(rows)[:, None] + torch.arange(groups)) % 3 == 0] = 0
    x, bias = make_inputs(config, case)
    output_tiles = -(-tiles(case.rows) // config.row_blocks) * -(-case.tokens // config.block_m)
    k_tiles = -(-tiles(case.depth) // (config.block_k // 64 * config.warps_k))
    blocks = output_tiles * config.cluster if config.cluster > 1 else min(case.blocks, output_tiles * k_tiles)
    stream_k_tiles = output_tiles % blocks if config.family == "wgmma_ws" else output_tiles
    if config.whole_tiles:
        stream_k_tiles = 0
    y = torch.full((case.tokens, case.rows), torch.nan).to(config.dtype)
    workspace = torch.full(((blocks + stream_k_tiles) * config.block_n * config.block_m,), torch.nan)
    semaphores = torch.zeros(stream_k_tiles * config.warps, dtype=torch.int32)
    arguments_of_weight = within_larger(case, *pack(config, case, weight))
    arguments = [
        *input_arguments(config, *arguments_of_weight, x),
        None if bias is None else bias.view(torch.int16),
        y.view(torch.int16),
        workspace,
        semaphores,
        case.tokens,
        case.rows,
        case.depth,
        *([] if config.family == "wgmma_ws" else [arguments_of_weight[1].stride(0) // 64]),
        *affine(config, case, code_bits=8),
    ]
    kernel = compile_kernel(
        source or read_source(config.source_name), config.function, config.defines(), sanitize=sanitize
    )
    seed = case.seed if order is None else order
    for _ in range(launches):
        kernel.launch((blocks,), (config.threads,), arguments, shared_bytes=config.shared_bytes(), seed=seed)
    assert not semaphores.any(), "tile semaphores are not 0 after the launch"
    return expected(config, weight, x, bias, y)


def expected(config: GemmConfig, weight: NestedWeight, x: Tensor, bias: Tensor | None, y: Tensor) -> GemmResult:
    """Result ``y`` with the exact and the best possible one."""
    dense = exact_weight(weight, config.bits)
    added = 0 if bias is None else bias.double()
    exact, of_rounded = (x.double() @ values.double().T + added for values in (dense, dense.to(config.dtype)))
    best = of_rounded if config.family == "wgmma_ws" else exact
    return GemmResult(y, exact, best.to(config.dtype))


def input_arguments(
    config: GemmConfig, planes: Tensor, scales: Tensor, zeros: Tensor | None, x: Tensor
) -> list[Argument]:
    """Kernel arguments for planes, scales, zero points and x."""
    x_map = TensorMap(x, TmaDescriptor(2, tuple(x.shape), (config.block_m, 64), swizzle_128b=True))
    if config.family == "wgmma_ws":
        return [*weight_maps(config, planes, scales, zeros), x_map]
    stride = ctypes.c_uint64(planes.stride(0) // 4)
    return [planes, stride, scales.view(torch.int16), zeros, x_map if config.family == "wgmma" else x.view(torch.int16)]


def weight_maps(config: GemmConfig, planes: Tensor, scales: Tensor, zeros: Tensor | None) -> list[Argument]:
    """TMA descriptors of planes, scales and zero points for ``gemm_sm90_ws.cu``, with 8-byte elements."""
    rows, units, groups = planes.shape[1], planes.shape[2], config.groups_per_k_tile
    read = planes_read(config.bits, 8, config.slicing)
    of_planes = TmaDescriptor(8, (read, rows, 64 * units), (read, config.row_blocks, config.block_k))
    of_groups = [TmaDescriptor(8, (scales.shape[0], n * rows), (groups, n * config.row_blocks)) for n in (16, 8)]
    return [
        TensorMap(planes, of_planes),
        TensorMap(scales, of_groups[0]),
        None if zeros is None else TensorMap(zeros, of_groups[1]),
    ]


def exact_weight(weight: NestedWeight, bits: int) -> Tensor:
    """Dense weight at ``bits`` bits in float64, from the format's definition."""
    drop = weight.format.master_bits - bits
    codes = weight.codes.double()
    if weight.format.slicing == "msb":
        value = (torch.floor(codes / 2**drop) + 0.5) * 2**drop
        if bits > 4:  # each plane adds or subtracts its step; those after the fourth are longer
            steps = [2.0 ** (weight.format.master_bits - 2 - plane) for plane in range(bits)]
            steps = [step * (weight.format.stretch if plane >= 4 else 1) for plane, step in enumerate(steps)]
            signs = [
                (weight.codes >> (weight.format.master_bits - 1 - plane) & 1).double() * 2 - 1 for plane in range(bits)
            ]
            value = 2.0 ** (weight.format.master_bits - 1) + sum(s * step for s, step in zip(signs, steps, strict=True))
    else:
        value = torch.clamp(torch.floor(codes / 2**drop + 0.5), max=2**bits - 1) * 2**drop
    group = torch.arange(codes.shape[1]) // weight.format.group_size  # of each column
    zero = (
        2 ** (weight.format.master_bits - 1) + weight.format.zero_point_offset
        if weight.zeros is None
        else weight.zeros.double()[:, group]
    )
    return (value - zero) * weight.scales.double()[:, group]
