"""Launch configurations of the GEMM and dequantization kernels; plain arithmetic, no GPU."""

import ctypes
import dataclasses
from typing import Any, NamedTuple

from torch import Tensor

from matquant.cuda.arguments import Address
from matquant.cuda.tma import encode_tma_descriptor
from matquant.formats.tile_layout import TILE, tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape, folds_zero_point_exactly
from matquant.inference.kernel_families import FAMILIES, choose_tile_config
from matquant.inference.kernel_families.base import LOAD_BYTES, WARP, TileConfig, TmaDescriptors
from matquant.inference.kernel_families.mma import GEMM_MAX_M

MAX_M = 1024  # tokens of one launch with WGMMA; strips of the dense weight are faster for more (H200)
_MAX_M_MANY_PLANES = 512  # the same where dequantization takes long
_MANY_PLANES = 6
STRIP_WEIGHTS = 2**26  # weights dequantized at a time: fewer are too little work for cuBLAS to fill all multiprocessors
_MIN_WEIGHTS_TWO_LAUNCHES = 2**25  # matrices from which two launches are faster than strips (H200)
_MIN_RESIDENT_SHARE = 0.94  # use an equal number of CTAs per tile if that keeps this share of resident CTAs busy
_DEQUANT_WARPS = 4  # warps of a CTA of kernels/dequant.cu, a tile each
_DEQUANT_ROW_BYTES = 144  # shared memory of a tile row there


def max_tokens(shape: GemmShape, device: DeviceLimits) -> int:
    """Largest number of tokens for which one launch of a GEMM kernel is the fastest way.

    The family ``wgmma_ws`` and strips round weights to the activations' dtype, as in a dense matrix.
    """
    if not device.wgmma or not folds_zero_point_exactly(shape):
        return GEMM_MAX_M
    return MAX_M if shape.planes < _MANY_PLANES else _MAX_M_MANY_PLANES


def prefers_two_launches(tokens: int, rows: int, depth: int) -> bool:
    """Return True if two launches without WGMMA, with half of the tokens each, are faster than strips."""
    return GEMM_MAX_M < tokens <= 2 * GEMM_MAX_M and rows * depth >= _MIN_WEIGHTS_TWO_LAUNCHES


def plane_stride(planes: Tensor) -> ctypes.c_uint64:
    """Distance of two planes in units of 16 bytes."""
    return ctypes.c_uint64(planes.stride(0) * planes.element_size() // LOAD_BYTES)


def scale_row_tiles(scales: Tensor) -> int:
    """Number of row tiles between the scales of two groups."""
    return scales.stride(0) // TILE


def dequantize_launch(
    shape: GemmShape, rows: int, first_tile: int, row_tiles: int
) -> tuple[int, int, int, tuple[Any, ...]]:
    """Launch of ``kernels/dequant.cu`` for ``rows`` rows, from a tile of 64 rows on.

    Args:
        row_tiles: see ``scale_row_tiles``.

    Returns:
        Grid, block, bytes of shared memory, and the arguments after the output.
    """
    grid = -(-tiles(rows) * tiles(shape.depth) // _DEQUANT_WARPS)
    numbers = (first_tile, rows, shape.depth, row_tiles, *shape.affine())
    return grid, WARP * _DEQUANT_WARPS, _DEQUANT_WARPS * TILE * _DEQUANT_ROW_BYTES, numbers


class WeightArguments(NamedTuple):
    """Arguments of a kernel that follow from the weight.

    Attributes:
        first: planes, scales and zero points: tensors, addresses or TMA descriptors; and the stride of the planes.
        last: number of row tiles, see ``scale_row_tiles``; empty for a kernel that takes no strides.
    """

    first: tuple[Any, ...]
    last: tuple[int, ...]

    def by_address(self) -> "WeightArguments":
        """Arguments with addresses in place of the tensors, which they do not keep alive."""
        first = (Address(one.data_ptr()) if isinstance(one, Tensor) else one for one in self.first)
        return WeightArguments(tuple(first), self.last)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Launch of a GEMM kernel.

    Attributes:
        source, function: the kernel.
        defines: macros of its compilation.
        grid, block, shared_bytes: CTAs, threads of a CTA, dynamic shared memory of a CTA.
        workspace: float32 numbers for partial sums; not initialized.
        tile_semaphores: uint32 numbers; 0 before and after the launch.
        descriptors: TMA descriptors of planes, scales, zero points and x; None without TMA.
        sizes: rows, and columns rounded up to a multiple of 8: arguments after the number of tokens.
        affine: last arguments, see ``GemmShape.affine``.
        takes_strides: True if the kernel takes the strides of planes and scales as arguments; else descriptors hold them.
    """

    shape: GemmShape
    source: str
    function: str
    defines: dict[str, int]
    grid: int
    block: int
    shared_bytes: int
    workspace: int
    tile_semaphores: int
    descriptors: TmaDescriptors | None
    sizes: tuple[int, int]
    affine: tuple[float, float, float]
    takes_strides: bool

    def weight_arguments(self, planes: Tensor, scales: Tensor, zeros: Tensor | None) -> WeightArguments:
        """Arguments of the kernel for a weight, which may be a range of row tiles of a larger one."""
        arrays: list[Any] = [planes, scales, zeros]
        for i, spec in enumerate((self.descriptors or ())[:3]):
            if spec is not None and arrays[i] is not None:
                arrays[i] = encode_tma_descriptor(arrays[i], spec)
        if not self.takes_strides:
            return WeightArguments(tuple(arrays), ())
        return WeightArguments((arrays[0], plane_stride(planes), *arrays[1:]), (scale_row_tiles(scales),))

    def arguments(
        self,
        weight: WeightArguments,
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
        workspace: Tensor | None,
        tile_semaphores: Tensor | None,
        tokens: int,
    ) -> tuple[Any, ...]:
        """Arguments of the kernel, in its order."""
        spec = None if self.descriptors is None else self.descriptors[3]
        rows = x if spec is None else encode_tma_descriptor(x, spec)
        arrays = (*weight.first, rows, bias, y, workspace, tile_semaphores)
        return (*arrays, tokens, *self.sizes, *weight.last, *self.affine)

    def arguments_of_weight(self, weight: WeightArguments, tokens: int) -> tuple[tuple[Any, ...], slice]:
        """Arguments that all calls of a weight share, and the place of the five null pointers among them.

        In a call these are activations, bias, output, workspace and semaphores. For kernels that read the activations by their
        address.
        """
        first, arrays = len(weight.first), (None,) * 5
        arguments = (*weight.first, *arrays, tokens, *self.sizes, *weight.last, *self.affine)
        return arguments, slice(first, first + len(arrays))


def make_launch_config(shape: GemmShape, device: DeviceLimits, tile: TileConfig | None = None) -> LaunchConfig:
    """Launch of a shape on a device.

    Args:
        tile: tile configuration; that of ``choose_tile_config`` if None.
    """
    tile = choose_tile_config(shape, device) if tile is None else tile
    family = FAMILIES[tile.family]
    shared = family.shared_bytes(shape, tile)
    output_tiles = -(-tiles(shape.rows) // tile.row_blocks) * -(-shape.tokens // tile.block_m)
    k_tiles = -(-tiles(shape.depth) // (tile.k_units * tile.warps_k))
    in_clusters = tile.cluster > 1
    grid = _grid(device.multiprocessors * tile.ctas_per_sm, output_tiles, k_tiles)
    if in_clusters or tile.whole_tiles:
        waves = -(-output_tiles // device.multiprocessors) if family.persistent and not in_clusters else 1
        grid = -(-output_tiles // waves) * tile.cluster
    split_tiles = 0 if in_clusters or tile.whole_tiles else output_tiles % grid if family.persistent else output_tiles
    return LaunchConfig(
        shape=shape,
        source=family.source,
        function=family.function,
        defines=shape.defines() | family.defines(tile) | {"SHARED_BYTES": shared},
        grid=grid,
        block=family.threads(tile),
        shared_bytes=shared,
        workspace=0 if in_clusters or tile.whole_tiles else (grid + split_tiles) * tile.block_n * tile.block_m,
        tile_semaphores=split_tiles * tile.mma_warps,
        descriptors=family.tma_descriptors(shape, tile),
        sizes=(shape.rows, -(-shape.depth // 8) * 8),
        affine=shape.affine(),
        takes_strides=not family.persistent,
    )


def _grid(resident: int, output_tiles: int, k_tiles: int) -> int:
    """Number of CTAs for the k-tiles of all output tiles.

    All resident CTAs, or a few less so that every output tile has the same number of CTAs and no CTA works on two: fewer
        partial sums
    are reduced (7 % faster on an H200 with 256 CTAs of 264, for 64 tiles).
    """
    even = resident // output_tiles * output_tiles
    return min(even if even >= _MIN_RESIDENT_SHARE * resident else resident, output_tiles * k_tiles)
