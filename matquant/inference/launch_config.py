"""How ``kernels/gemm.cu``, ``gemm_sm90_ws.cu`` and ``dequant.cu`` are launched for a problem; plain arithmetic, no GPU."""

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from matquant.cuda.tma import Tiling, tensor_map
from matquant.formats.tile_layout import TILE, tiles
from matquant.inference.gemm_shape import Device, Problem, centred_exactly
from matquant.inference.tile_configs import TOKENS, WARP, Variant, choose

MOST_TOKENS = 1024  # that one launch takes with wgmma; more are faster by strips (H200: results/kernels)
_MOST_OF_MANY_PLANES = 512  # likewise, where decoding takes long
_MANY_PLANES = 6
STRIP_WEIGHTS = 2**26  # decoded at a time: fewer are too little work for cuBLAS to share out among all multiprocessors
_TWICE_WEIGHTS = 2**25  # of matrices from which two launches take less time than strips (H200: results/kernels)
_EVEN = 0.94  # of the blocks that could be resident must be left for every tile to have as many as the others
_DECODE_WARPS = 4  # a block of kernels/dequant.cu, a tile each
_DECODE_ROW_BYTES = 144  # of a tile in its shared memory


def most_tokens(problem: Problem, device: Device) -> int:
    """For how many tokens one launch of the matmul is the fastest way.

    For more than ``TOKENS``, by ``kernels/gemm_sm90_ws.cu`` or by strips, weights are rounded as a dense matrix would hold them.
    """
    if not device.wgmma or not centred_exactly(problem):
        return TOKENS
    return MOST_TOKENS if problem.planes < _MANY_PLANES else _MOST_OF_MANY_PLANES


def in_two(tokens: int, rows: int, depth: int) -> bool:
    """Whether two launches without wgmma, with half of the tokens each, are the faster way for so many tokens."""
    return TOKENS < tokens <= 2 * TOKENS and rows * depth >= _TWICE_WEIGHTS


def dequantize_launch(problem: Problem, rows: int, first_tile: int) -> tuple[int, int, int, tuple[Any, ...]]:
    """How ``kernels/dequant.cu`` decodes ``rows`` rows from a tile of 64 rows on.

    Returns:
        grid, block, bytes of shared memory, and the arguments that follow the output.
    """
    grid = -(-tiles(rows) * tiles(problem.depth) // _DECODE_WARPS)
    numbers = (first_tile, rows, problem.depth, tiles(problem.rows), *problem.affine())
    return grid, WARP * _DECODE_WARPS, _DECODE_WARPS * TILE * _DECODE_ROW_BYTES, numbers


Tilings = tuple[Tiling | None, Tiling | None, Tiling | None, Tiling | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A launch of the matmul.

    Attributes:
        source, function: the kernel.
        workspace: float32 numbers that it needs; not initialised.
        tickets: uint32 numbers that it needs; 0 before and after.
        tilings: of planes, scales, zero points and x; None for one that the kernel takes as it is, or for all.
    """

    problem: Problem
    source: str
    function: str
    defines: dict[str, int]
    grid: int
    block: int
    shared_bytes: int
    workspace: int
    tickets: int
    tilings: Tilings | None
    numbers: tuple[Any, ...]
    plane_stride: tuple[ctypes.c_uint64, ...]

    def arguments(
        self,
        planes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
        workspace: Tensor,
        tickets: Tensor,
        tokens: int,
    ) -> tuple[Any, ...]:
        """The kernel's arguments, in its order."""
        arrays: Sequence[Any] = (planes, scales, zeros, x)
        if self.tilings is not None:
            pairs = zip(arrays, self.tilings, strict=True)
            arrays = [a if a is None or tiling is None else tensor_map(a, tiling) for a, tiling in pairs]
        return (arrays[0], *self.plane_stride, *arrays[1:], bias, y, workspace, tickets, tokens, *self.numbers)


def _blocks(resident: int, all_tiles: int, chunks: int) -> int:
    """How many blocks share out the chunks of all tiles.

    As many as are resident at once, or a few less, so that every tile has the same number of blocks and none works on two:
    fewer partial sums are exchanged (on an H200 7 % faster with 256 blocks of 264, for 64 tiles).
    """
    even = resident // all_tiles * all_tiles
    return min(even if even >= _EVEN * resident else resident, all_tiles * chunks)


def plan(problem: Problem, device: Device, variant: Variant | None = None) -> Plan:
    """The launch of a problem on a device, by the variant of ``choose`` if None is given."""
    variant = choose(problem, device) if variant is None else variant
    shared = variant.shared_bytes(problem)
    token_tiles = -(-problem.tokens // (8 * variant.token_tiles))
    all_tiles = -(-tiles(problem.rows) // variant.row_warps) * token_tiles
    chunks = -(-tiles(problem.depth) // (variant.units * variant.k_warps))
    grid = _blocks(device.multiprocessors * variant.blocks, all_tiles, chunks)
    tile = TILE * variant.row_warps * 8 * variant.token_tiles
    shared_out = all_tiles % grid if variant.many else all_tiles
    return Plan(
        problem=problem,
        source="gemm_sm90_ws.cu" if variant.many else "gemm.cu",
        function="nested_gemm_sm90_ws" if variant.many else "nested_gemm",
        defines=problem.defines() | variant.defines() | {"SHARED_BYTES": shared},
        grid=grid,
        block=variant.threads,
        shared_bytes=shared,
        workspace=(grid + shared_out) * tile,
        tickets=shared_out * variant.warps,
        tilings=_tilings(problem, variant),
        numbers=(problem.rows, -(-problem.depth // 8) * 8, *problem.affine()),
        plane_stride=() if variant.many else (ctypes.c_uint64(tiles(problem.rows) * tiles(problem.depth) * WARP),),
    )


def _tilings(problem: Problem, variant: Variant) -> Tilings | None:
    if not variant.wgmma:
        return None
    depth = -(-problem.depth // 8) * 8
    x = Tiling(2, (problem.tokens, depth), (8 * variant.token_tiles, TILE), turned=True)
    if not variant.many:
        return None, None, None, x
    row_blocks, units, columns = tiles(problem.rows), tiles(problem.depth), TILE * variant.units
    all_groups = -(-units * TILE // problem.group) if problem.group else 1
    groups = columns // problem.group if 0 < problem.group < columns else 1
    return (
        Tiling(8, (problem.planes, row_blocks, 64 * units), (problem.planes, variant.row_warps, 64 * variant.units)),
        Tiling(8, (all_groups, 16 * row_blocks), (groups, 16 * variant.row_warps)),
        Tiling(8, (all_groups, 8 * row_blocks), (groups, 8 * variant.row_warps)),
        x,
    )
