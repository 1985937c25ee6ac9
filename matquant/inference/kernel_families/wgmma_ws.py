"""Kernel family by warp-specialized, persistent WGMMA for more than 64 tokens, on sm_90a."""

from collections.abc import Sequence

import torch

from matquant.cuda.tma import TmaDescriptor
from matquant.formats.tile_layout import TILE, stored_group_count, tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import (
    WARP,
    KernelFamily,
    TileCandidate,
    TileConfig,
    TmaDescriptors,
    weight_stage_bytes,
)
from matquant.inference.kernel_families.mma import GEMM_MAX_M, LARGE_WEIGHTS
from matquant.inference.kernel_families.wgmma import uses_wgmma, x_descriptor

_PRODUCER_WARPS = 4
_X_ALIGNMENT = 1024  # bytes, of activations with a 128-byte swizzle
_SMALL_WEIGHTS, _SMALL_MAX_M = 2**24, 512  # a small matrix has few tiles for all CTAs: smaller tiles are faster
_SHORT_WORTH = 0.8  # prefer block_m=128 if it pads M to at most this share of what block_m=256 would

# Candidates, the best first: 128 tokens of a matrix that is not large, of a large one, and 256 tokens.
_SHORT = (
    TileCandidate(block_m=128, block_n=128, block_k=128, warps_m=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, warps_m=4),
)
_SHORT_LARGE = (
    TileCandidate(block_m=128, block_n=256, block_k=128, warps_m=2, min_stages=3),
    TileCandidate(block_m=128, block_n=256, block_k=64, warps_m=2, min_stages=3),
    TileCandidate(block_m=128, block_n=128, block_k=128, warps_m=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, warps_m=4),
)
_LONG = (
    TileCandidate(block_m=256, block_n=128, block_k=128, warps_m=4, min_stages=3),
    TileCandidate(block_m=256, block_n=128, block_k=64, warps_m=4, min_stages=3),
    TileCandidate(block_m=256, block_n=128, block_k=128, warps_m=4),
    TileCandidate(block_m=128, block_n=128, block_k=128, warps_m=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, warps_m=4),
)


class WgmmaWsFamily(KernelFamily):
    """One producer warpgroup issues TMA loads; consumer warpgroups dequantize and multiply; stream-K for the last tiles."""

    name = "wgmma_ws"
    source, function = "gemm_sm90_ws.cu", "nested_gemm_sm90_ws"
    wgmma = True
    persistent = True

    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        return uses_wgmma(shape, device) and shape.tokens > GEMM_MAX_M

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        weights = shape.rows * shape.depth
        if weights <= _SMALL_WEIGHTS and shape.tokens <= _SMALL_MAX_M:
            return _SHORT
        short, long = (-(-shape.tokens // block_m) * block_m for block_m in (128, 256))
        if short > _SHORT_WORTH * long:
            return _LONG
        return _SHORT_LARGE if weights >= LARGE_WEIGHTS or shape.tokens > 128 else _SHORT

    def spills(self, shape: GemmShape, tile: TileCandidate) -> bool:
        zeros, units = shape.format.has_zero_points, tile.block_k // TILE
        if tile.block_m == 256:
            return units == 1 and (shape.planes, shape.dtype) in ((2, torch.float16), (8, torch.bfloat16))
        if tile.warps_m == 4:
            return False
        if units > 1:
            return shape.planes + zeros >= 6
        return shape.dtype == torch.bfloat16 and shape.planes + 2 * zeros >= 8

    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        ring = tile.warps_k * tile.warps_n * tile.stages * weight_stage_bytes(shape, tile)
        x, barriers = tile.stages * tile.block_m * tile.block_k * 2, 2 * 8 * tile.stages
        return -(-(x + ring + barriers) // _X_ALIGNMENT) * _X_ALIGNMENT

    def threads(self, tile: TileConfig) -> int:
        return WARP * (tile.mma_warps + _PRODUCER_WARPS)

    def tma_descriptors(self, shape: GemmShape, tile: TileConfig) -> TmaDescriptors | None:
        row_tiles, units = tiles(shape.rows), tiles(shape.depth)
        all_groups = stored_group_count(shape.depth, shape.format.group_size)
        groups = tile.block_k // shape.group if 0 < shape.group < tile.block_k else 1
        planes = TmaDescriptor(
            8, (shape.planes, row_tiles, 64 * units), (shape.planes, tile.warps_n, 64 * tile.k_units)
        )
        scales = TmaDescriptor(8, (all_groups, 16 * row_tiles), (groups, 16 * tile.warps_n))
        zeros = TmaDescriptor(8, (all_groups, 8 * row_tiles), (groups, 8 * tile.warps_n))
        return planes, scales, zeros, x_descriptor(shape, tile)
