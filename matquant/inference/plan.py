"""How ``kernels/gemm.cu`` and ``kernels/decode.cu`` are compiled and launched for a problem; plain arithmetic, no GPU."""

import ctypes
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.inference.layout import TILE, tiles
from matquant.nested import Slicing, planes_read

TOKENS = 64  # that one launch takes at most without wgmma; for more, strips are decoded for cuBLAS
MOST_TOKENS = 512  # and with it: more are faster by strips (H200: experiments/kernels)
_MANY_PLANES = (
    6  # from here on so many tokens are, as each tile of them decodes the weights anew, which then takes long
)
_MOST_OF_MANY_PLANES = 256
STRIP_WEIGHTS = 2**26  # decoded at a time: fewer are too little work for cuBLAS to share out among all multiprocessors
_TWICE_WEIGHTS = 2**25  # of matrices from which two launches take less time than strips (H200: experiments/kernels)
_WARP = 32
_LOAD = 16  # bytes
_TICKET_BYTES = 4
_DECODE_WARPS = 4  # a block of kernels/decode.cu, a tile each
_DECODE_ROW_BYTES = 144  # of a tile in its shared memory


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
class Variant:
    """How the matmul's work is shared out; the macros of ``kernels/gemm.cu``.

    Attributes:
        token_tiles: of 8 tokens.
        units: of 64 columns, of a chunk.
        stages: of a warp's ring of weights in shared memory.
        panel: chunks of activations that are copied at a time.
        blocks: on a multiprocessor.
        wgmma: how the tensor cores are used (``kernels/gemm_wgmma.cuh``); any number of tokens then.
    """

    token_tiles: int
    row_warps: int
    tile_warps: int
    k_warps: int
    units: int
    stages: int
    panel: int
    blocks: int
    wgmma: bool = False

    @property
    def threads(self) -> int:
        return _WARP * self.row_warps * self.tile_warps * self.k_warps

    def defines(self) -> dict[str, int]:
        return {
            "TOKEN_TILES": self.token_tiles,
            "ROW_WARPS": self.row_warps,
            "TILE_WARPS": self.tile_warps,
            "K_WARPS": self.k_warps,
            "UNITS": self.units,
            "STAGES": self.stages,
            "PANEL": self.panel,
            "BLOCKS_PER_SM": self.blocks,
            "WGMMA": int(self.wgmma),
        }

    def shared_bytes(self, problem: Problem) -> int:
        """The size of ``Shared`` in ``kernels/gemm.cu``."""
        columns = TILE * self.units
        groups = columns // (problem.group if 0 < problem.group < columns else columns)
        tokens = 8 * self.token_tiles
        weights = self.units * problem.planes * _WARP * _LOAD + groups * TILE * (3 if problem.zeros else 2)
        ring = self.k_warps * self.row_warps * self.stages * weights
        panels = 1 + -(-(self.stages - 1) // self.panel)  # of activations: one in work, the others on their way
        padding = 0 if self.wgmma else 8
        x = panels * self.panel * tokens * (columns * self.k_warps + padding) * 2
        exchange = self.k_warps * self.row_warps * 4 * self.token_tiles * _WARP * _LOAD if self.k_warps > 1 else 0
        barriers = -(-8 * panels // 16) * 16
        x_sums = self.panel * self.k_warps * groups * tokens * 4
        return x + ring + exchange + (barriers if self.wgmma else x_sums)


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


# (row_warps, tile_warps, k_warps, units, panel, blocks, least stages) by tiles of 8 tokens, the best first, for matrices whose
# tiles of 64 rows are fewer than half of the device's multiprocessors, for the others, and for large ones. The first that fits
# a device's shared memory is taken, with as many stages as there is room for. Measured on an H200: experiments/kernels. The
# last ones are for devices with less.
_SMALL = ((1, 1, 4, 1, 1, 2, 2), (1, 1, 2, 1, 1, 2, 2), (1, 1, 1, 1, 1, 1, 2))
_SMALL_MANY = ((4, 2, 1, 1, 2, 1, 2), (4, 1, 1, 1, 1, 1, 2), (2, 1, 1, 1, 1, 1, 2), (1, 2, 1, 1, 1, 1, 2))
_NARROW = {
    1: ((1, 1, 8, 2, 1, 2, 2), (1, 1, 4, 2, 1, 2, 3), (1, 1, 8, 1, 2, 2, 2), (2, 1, 8, 1, 2, 1, 2), *_SMALL),
    2: ((2, 1, 4, 2, 1, 1, 2), (2, 1, 4, 1, 1, 1, 2), *_SMALL),
    4: ((2, 1, 4, 2, 1, 1, 2), (4, 1, 2, 2, 1, 1, 2), (4, 1, 2, 1, 2, 1, 2), *_SMALL_MANY),
    8: ((4, 2, 1, 2, 1, 1, 2), (4, 2, 1, 1, 2, 1, 2), (2, 4, 1, 1, 1, 1, 2), (1, 2, 1, 1, 1, 1, 2)),
}
_WIDE = {
    1: ((4, 1, 2, 2, 4, 2, 2), (8, 1, 2, 2, 4, 1, 2), (4, 1, 2, 1, 4, 2, 2), *_SMALL),
    2: ((4, 1, 2, 2, 4, 1, 2), (8, 1, 1, 2, 4, 1, 2), (4, 1, 1, 1, 1, 1, 2), *_SMALL),
    4: ((4, 1, 2, 2, 1, 1, 2), (8, 1, 1, 2, 2, 1, 2), *_SMALL_MANY),
    8: _NARROW[8],
}
_LARGE = {
    1: ((16, 1, 1, 4, 4, 1, 2), (16, 1, 1, 2, 8, 1, 2), *_WIDE[1]),
    2: ((8, 1, 1, 4, 2, 1, 2), (8, 1, 1, 2, 4, 1, 2), *_WIDE[2]),
    4: ((8, 1, 1, 2, 2, 1, 2), *_SMALL_MANY),
    8: _NARROW[8],
}
_LARGE_WEIGHTS = 2**27  # from here on
# The same by wgmma. What counts as narrow or wide are tiles of 64 rows and of so many tokens.
_TILE_TOKENS = 128  # of the largest tile
_FIRST_OF_WGMMA = 17  # tokens: for fewer, mma.sync is as fast or faster
_WGMMA_SMALL = ((4, 1, 2, 2, 1, 1, 2), (1, 4, 1, 1, 1, 1, 2))
_WGMMA_NARROW = {
    4: ((2, 2, 4, 2, 1, 1, 2), *_WGMMA_SMALL),
    8: ((1, 4, 4, 2, 1, 1, 2), (2, 2, 2, 2, 1, 1, 2), *_WGMMA_SMALL),
    16: ((1, 4, 2, 2, 1, 1, 2), (1, 4, 1, 1, 1, 1, 2)),
}
_WGMMA_WIDE = {
    4: _WGMMA_SMALL,
    8: ((2, 2, 1, 4, 1, 2, 2), (4, 2, 1, 4, 1, 1, 2), (2, 2, 2, 2, 1, 1, 2), *_WGMMA_SMALL),
    16: ((4, 2, 1, 4, 1, 1, 2), (4, 2, 1, 2, 1, 1, 2), (1, 4, 1, 1, 1, 1, 2)),
}
_WGMMA_LARGE = {
    4: ((8, 1, 1, 4, 1, 1, 2), *_WGMMA_SMALL),
    8: ((8, 1, 1, 4, 1, 1, 3), (8, 1, 1, 2, 2, 1, 2), *_WGMMA_SMALL),
    16: _WGMMA_WIDE[16],
}
_MOST_STAGES = 6
_EVEN = 0.94  # of the blocks that could be resident must be left for every tile to have as many as the others
_RESERVED = 1024  # bytes of shared memory that each block costs beside its own, from sm_80 on


def choose(problem: Problem, device: Device) -> Variant:
    """The variant for a problem of at most ``most_tokens`` tokens."""
    wgmma = _by_wgmma(problem, device)
    least = 4 if wgmma else 1
    sizes = (1, 2, 4, 8, _TILE_TOKENS // 8)
    token_tiles = next((n for n in sizes if n >= least and problem.tokens <= 8 * n), sizes[-1])
    for row_warps, tile_warps, k_warps, units, panel, blocks, least_stages in _shapes(problem, device, wgmma)[
        token_tiles
    ]:
        if 0 < problem.group < TILE and _spills(problem, token_tiles, tile_warps, units, wgmma):
            continue
        columns = TILE * units
        if problem.group and problem.group % columns and columns % problem.group:
            continue  # a chunk would hold a part of a group and more
        for stages in range(_MOST_STAGES, least_stages - 1, -1):
            variant = Variant(
                token_tiles=token_tiles,
                row_warps=row_warps,
                tile_warps=tile_warps,
                k_warps=k_warps,
                units=units,
                stages=stages,
                panel=panel,
                blocks=blocks,
                wgmma=wgmma,
            )
            if blocks * (variant.shared_bytes(problem) + _RESERVED) <= device.shared_bytes:
                return variant
    raise ValueError(f"no variant fits {device.shared_bytes} bytes of shared memory")


def _spills(problem: Problem, token_tiles: int, tile_warps: int, units: int, wgmma: bool) -> bool:
    """Whether with groups of 32 so many scales and zero points are in flight that registers would spill."""
    if wgmma:
        return problem.zeros and token_tiles >= 8 * tile_warps
    return units > 2 or (token_tiles > 2 and (units > 1 or tile_warps < token_tiles // 2))


def _by_wgmma(problem: Problem, device: Device) -> bool:
    return device.wgmma and problem.tokens >= _FIRST_OF_WGMMA and centred_exactly(problem)


def _shapes(problem: Problem, device: Device, wgmma: bool) -> Mapping[int, tuple[tuple[int, ...], ...]]:
    token_tiles = -(-problem.tokens // _TILE_TOKENS)
    if 2 * tiles(problem.rows) * token_tiles < device.multiprocessors:
        return _WGMMA_NARROW if wgmma else _NARROW
    if problem.rows * problem.depth >= _LARGE_WEIGHTS:
        return _WGMMA_LARGE if wgmma else _LARGE
    return _WGMMA_WIDE if wgmma else _WIDE


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


def most_tokens(problem: Problem, device: Device) -> int:
    """For how many tokens one launch of the matmul is the fastest way."""
    if not device.wgmma or not centred_exactly(problem):
        return TOKENS
    return MOST_TOKENS if problem.planes < _MANY_PLANES else _MOST_OF_MANY_PLANES


def supported(problem: Problem) -> bool:
    """Whether the kernels take the problem; torch computes it otherwise, in strips."""
    halves = (torch.float16, torch.bfloat16)
    group = problem.group == 0 or problem.group == TILE // 2 or problem.group % TILE == 0
    return group and problem.dtype in halves and problem.scale_dtype in halves


def in_two(tokens: int, rows: int, depth: int) -> bool:
    """Whether two launches without wgmma, with half of the tokens each, are the faster way for so many tokens."""
    return TOKENS < tokens <= 2 * TOKENS and rows * depth >= _TWICE_WEIGHTS


def decode_launch(problem: Problem, rows: int, first_tile: int) -> tuple[int, int, int, tuple[Any, ...]]:
    """How ``kernels/decode.cu`` decodes ``rows`` rows from a tile of 64 rows on.

    Returns:
        grid, block, bytes of shared memory, and the arguments that follow the output.
    """
    grid = -(-tiles(rows) * tiles(problem.depth) // _DECODE_WARPS)
    numbers = (first_tile, rows, problem.depth, tiles(problem.rows), *problem.affine())
    return grid, _WARP * _DECODE_WARPS, _DECODE_WARPS * TILE * _DECODE_ROW_BYTES, numbers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A launch of the matmul.

    Attributes:
        workspace: float32 numbers that it needs; not initialised.
        tickets: uint32 numbers that it needs; 0 before and after.
        tile_tokens: of the tensor map that it takes in place of x; 0 where it takes x itself.
    """

    problem: Problem
    defines: dict[str, int]
    grid: int
    block: int
    shared_bytes: int
    workspace: int
    tickets: int
    tile_tokens: int
    numbers: tuple[Any, ...]
    plane_stride: ctypes.c_uint64

    def arguments(
        self,
        planes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        x: Tensor | bytes,
        bias: Tensor | None,
        y: Tensor,
        workspace: Tensor,
        tickets: Tensor,
        tokens: int,
    ) -> tuple[Any, ...]:
        """The kernel's arguments, in its order; ``x`` is a tensor map where wgmma is used."""
        return (planes, self.plane_stride, scales, zeros, x, bias, y, workspace, tickets, tokens, *self.numbers)


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
    return Plan(
        problem=problem,
        defines=problem.defines() | variant.defines() | {"SHARED_BYTES": shared},
        grid=grid,
        block=variant.threads,
        shared_bytes=shared,
        workspace=(grid + all_tiles) * tile,
        tickets=all_tiles * (variant.threads // _WARP),
        tile_tokens=8 * variant.token_tiles if variant.wgmma else 0,
        numbers=(problem.rows, -(-problem.depth // 8) * 8, *problem.affine()),
        plane_stride=ctypes.c_uint64(tiles(problem.rows) * tiles(problem.depth) * _WARP),
    )
