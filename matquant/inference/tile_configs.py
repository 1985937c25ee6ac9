"""How ``kernels/gemm.cu`` shares out the work of a problem: its variants, and which of them is taken."""

import dataclasses

import torch

from matquant.formats.tile_layout import TILE, tiles
from matquant.inference.gemm_shape import Device, Problem, centred_exactly

LOAD = 16  # bytes
WARP = 32
TOKENS = 64  # that kernels/gemm.cu takes at most
_ASKING_WARPS = 4  # of kernels/gemm_sm90_ws.cu
_TILE_ALIGNMENT = 1024  # bytes, of activations that are copied in tiles


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """How the matmul's work is shared out; the macros of ``kernels/gemm.cu`` and ``kernels/gemm_sm90_ws.cu``.

    Attributes:
        token_tiles: of 8 tokens.
        units: of 64 columns, of a chunk.
        stages: of a warp's ring of weights in shared memory.
        panel: chunks of activations that are copied at a time.
        blocks: on a multiprocessor.
        wgmma: how the tensor cores are used (``kernels/gemm_wgmma.cuh``); any number of tokens then.
        many: by ``kernels/gemm_sm90_ws.cu``, with wgmma.
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
    many: bool = False

    @property
    def warps(self) -> int:
        """That multiply."""
        return self.row_warps * self.tile_warps * self.k_warps

    @property
    def threads(self) -> int:
        return WARP * (self.warps + (_ASKING_WARPS if self.many else 0))

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
        """The size of ``Shared`` in the kernel."""
        columns = TILE * self.units
        groups = columns // (problem.group if 0 < problem.group < columns else columns)
        tokens = 8 * self.token_tiles
        weights = self.units * problem.planes * WARP * LOAD + groups * TILE * (
            3 if problem.format.has_zero_points else 2
        )
        ring = self.k_warps * self.row_warps * self.stages * weights
        if self.many:
            barriers = 2 * 8 * self.stages
            return -(-(self.stages * tokens * columns * 2 + ring + barriers) // _TILE_ALIGNMENT) * _TILE_ALIGNMENT
        panels = 1 + -(-(self.stages - 1) // self.panel)  # of activations: one in work, the others on their way
        padding = 0 if self.wgmma else 8
        x = panels * self.panel * tokens * (columns * self.k_warps + padding) * 2
        exchange = self.k_warps * self.row_warps * 4 * self.token_tiles * WARP * LOAD if self.k_warps > 1 else 0
        barriers = -(-8 * panels // 16) * 16
        x_sums = self.panel * self.k_warps * groups * tokens * 4
        return x + ring + exchange + (barriers if self.wgmma else x_sums)


# (row_warps, tile_warps, k_warps, units, panel, blocks, least stages) by tiles of 8 tokens, the best first, for matrices whose
# tiles of 64 rows are fewer than half of the device's multiprocessors, for the others, and for large ones. The first that fits
# a device's shared memory is taken, with as many stages as there is room for. Measured on an H200: experiments/results/kernels. The
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
# The same by wgmma.
FIRST_OF_WGMMA = 17  # tokens: for fewer, mma.sync is as fast or faster
_WGMMA_SMALL = ((4, 1, 2, 2, 1, 1, 2), (1, 4, 1, 1, 1, 1, 2))
_WGMMA_NARROW = {
    4: ((2, 2, 4, 2, 1, 1, 2), *_WGMMA_SMALL),
    8: ((1, 4, 4, 2, 1, 1, 2), (2, 2, 2, 2, 1, 1, 2), *_WGMMA_SMALL),
}
_WGMMA_WIDE = {4: _WGMMA_SMALL, 8: ((2, 2, 1, 4, 1, 2, 2), (4, 2, 1, 4, 1, 1, 2), (2, 2, 2, 2, 1, 1, 2), *_WGMMA_SMALL)}
_WGMMA_LARGE = {
    4: ((8, 1, 1, 4, 1, 1, 2), *_WGMMA_SMALL),
    8: ((8, 1, 1, 4, 1, 1, 3), (8, 1, 1, 2, 2, 1, 2), *_WGMMA_WIDE[8][1:]),
}
# For more than TOKENS, by gemm_sm90_ws.cu, with the tiles of 8 tokens in front: 128 tokens at a time, of matrices that are not
# large and of large ones; 256 at a time. A small matrix has few tiles for the blocks: for up to so many tokens smaller ones
# are better.
_MANY_SHORT = ((16, 2, 4, 1, 2, 1, 1, 2), (16, 2, 4, 1, 1, 1, 1, 2))
_MANY_SHORT_LARGE = ((16, 4, 2, 1, 2, 1, 1, 3), (16, 4, 2, 1, 1, 1, 1, 3), *_MANY_SHORT)
_MANY = ((32, 2, 4, 1, 2, 1, 1, 3), (32, 2, 4, 1, 1, 1, 1, 3), (32, 2, 4, 1, 2, 1, 1, 2), *_MANY_SHORT)
_SMALL_WEIGHTS, _SMALL_TOKENS = 2**24, 512
_WORTH_SHORT = 0.8  # tiles of 128 tokens, if they leave no more than this of the tokens that tiles of 256 compute
_MOST_STAGES = 6
_RESERVED = 1024  # bytes of shared memory that each block costs beside its own, from sm_80 on


def choose(problem: Problem, device: Device) -> Variant:
    """The variant for a problem of at most ``most_tokens`` tokens."""
    wgmma = _by_wgmma(problem, device)
    many = wgmma and problem.tokens > TOKENS
    shapes = _many_shapes(problem) if many else _shapes(problem, device, wgmma)
    for token_tiles, row_warps, tile_warps, k_warps, units, panel, blocks, least_stages in shapes:
        if _spills(problem, token_tiles, tile_warps, units, wgmma, many):
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
                many=many,
            )
            if blocks * (variant.shared_bytes(problem) + _RESERVED) <= device.shared_bytes:
                return variant
    raise ValueError(f"no variant fits {device.shared_bytes} bytes of shared memory")


def _spills(problem: Problem, token_tiles: int, tile_warps: int, units: int, wgmma: bool, many: bool) -> bool:
    """Whether sums, and what else is in flight, would need more registers than there are."""
    small_groups = 0 < problem.group < TILE
    if many:
        if token_tiles == 32:
            return units == 1 and (problem.planes, problem.dtype) in ((2, torch.float16), (8, torch.bfloat16))
        if tile_warps == 4:
            return False
        if units > 1:
            return problem.planes + problem.format.has_zero_points >= 6
        return problem.dtype == torch.bfloat16 and problem.planes + 2 * problem.format.has_zero_points >= 8
    if wgmma:
        most = 0 if problem.planes < 8 else 1 if problem.dtype == torch.float16 else 2  # bfloat16 takes two fragments
        return token_tiles >= 8 * tile_warps and small_groups + problem.format.has_zero_points + most > 1
    return small_groups and (units > 2 or (token_tiles > 2 and (units > 1 or tile_warps < token_tiles // 2)))


def _by_wgmma(problem: Problem, device: Device) -> bool:
    return device.wgmma and problem.tokens >= FIRST_OF_WGMMA and centred_exactly(problem)


def _shapes(problem: Problem, device: Device, wgmma: bool) -> list[tuple[int, ...]]:
    """What is possible, the best first: tiles of 8 tokens, and then as above."""
    if 2 * tiles(problem.rows) < device.multiprocessors:
        shapes = _WGMMA_NARROW if wgmma else _NARROW
    elif problem.rows * problem.depth >= _LARGE_WEIGHTS:
        shapes = _WGMMA_LARGE if wgmma else _LARGE
    else:
        shapes = _WGMMA_WIDE if wgmma else _WIDE
    token_tiles = next(n for n in shapes if problem.tokens <= 8 * n)
    return [(token_tiles, *shape) for shape in shapes[token_tiles]]


def _many_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    weights = problem.rows * problem.depth
    if weights <= _SMALL_WEIGHTS and problem.tokens <= _SMALL_TOKENS:
        return _MANY_SHORT
    short, long = (-(-problem.tokens // size) * size for size in (128, 256))
    if short > _WORTH_SHORT * long:
        return _MANY
    return _MANY_SHORT_LARGE if weights >= _LARGE_WEIGHTS or problem.tokens > 128 else _MANY_SHORT
