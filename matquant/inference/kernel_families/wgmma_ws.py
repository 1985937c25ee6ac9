"""Kernel family by warp-specialized WGMMA, on sm_90a: for more than 64 tokens, and for fewer where its CTAs fill the device."""

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
from matquant.inference.kernel_families.mma import GEMM_MAX_M, LARGE_WEIGHTS, cluster_bytes, cta_count, is_meant_for
from matquant.inference.kernel_families.wgmma import uses_wgmma, x_descriptor

_PRODUCER_WARPS = 4
_TMA_ALIGNMENT = 128  # bytes, of the destination of a load
_SMALL_WEIGHTS, _SMALL_MAX_M = 2**24, 512  # a small matrix has few tiles for all CTAs: smaller tiles are faster
_MIN_SHARE = 0.83  # of the multiprocessors that have work in up to two waves of whole tiles, or one of clusters
_FEW_WAVES, _MIN_SHARE_OF_MANY = 2, 0.95  # in more waves the partial sums of stream-K cost relatively less
_LONG_M = 256  # largest block_m: in many waves smaller tiles dequantize the weights too often
_SHORT_WORTH = 0.8  # prefer block_m=128 if it pads M to at most this share of what block_m=256 would

# Candidates, the best first: 128 tokens of a matrix that is not large, of a large one, and 256 tokens.
_SHORT = (
    TileCandidate(block_m=128, block_n=128, block_k=128, row_block_warps=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, row_block_warps=4),
)
_SHORT_LARGE = (
    TileCandidate(block_m=128, block_n=256, block_k=128, row_block_warps=2, min_stages=3),
    TileCandidate(block_m=128, block_n=256, block_k=64, row_block_warps=2, min_stages=3),
    TileCandidate(block_m=128, block_n=128, block_k=128, row_block_warps=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, row_block_warps=4),
)
_LONG = (
    TileCandidate(block_m=256, block_n=128, block_k=128, row_block_warps=4, min_stages=3),
    TileCandidate(block_m=256, block_n=128, block_k=64, row_block_warps=4, min_stages=3),
    TileCandidate(block_m=256, block_n=128, block_k=128, row_block_warps=4),
    TileCandidate(block_m=128, block_n=128, block_k=128, row_block_warps=4),
    TileCandidate(block_m=128, block_n=128, block_k=64, row_block_warps=4),
)
# Candidates without stream-K, the best first, where their CTAs fill the device (``_fills_waves``). Measured on an H200, see
# experiments/results/kernels. A device with 132 multiprocessors does not run 32 clusters of four at once.
_FULL_WAVES = (
    TileCandidate(
        block_m=256, block_n=128, block_k=128, row_block_warps=4, whole_tiles=True, min_stages=3, max_planes=2
    ),
    TileCandidate(block_m=256, block_n=128, block_k=64, row_block_warps=4, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=256, block_n=128, block_k=128, row_block_warps=4, cluster=2, min_stages=3, max_k_tiles=32),
    TileCandidate(block_m=256, block_n=128, block_k=64, row_block_warps=4, cluster=2, max_k_tiles=64),
    TileCandidate(block_m=128, block_n=256, block_k=128, row_block_warps=2, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=128, block_n=256, block_k=64, row_block_warps=2, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=128, block_n=192, block_k=128, row_block_warps=4, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=128, block_n=128, block_k=128, row_block_warps=4, whole_tiles=True, max_k_tiles=32),
    TileCandidate(block_m=128, block_n=128, block_k=128, row_block_warps=4, cluster=2, max_k_tiles=32),
    TileCandidate(block_m=128, block_n=192, block_k=128, row_block_warps=4, cluster=2, max_k_tiles=32),
    TileCandidate(block_m=128, block_n=192, block_k=64, row_block_warps=4, cluster=5),
    TileCandidate(block_m=128, block_n=256, block_k=128, row_block_warps=2, cluster=2, min_stages=3),
    TileCandidate(block_m=64, block_n=256, block_k=128, row_block_warps=2, cluster=2, min_stages=3),
    TileCandidate(block_m=64, block_n=256, block_k=64, row_block_warps=2, cluster=2, min_stages=3),
    TileCandidate(block_m=64, block_n=256, block_k=128, row_block_warps=2, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=64, block_n=256, block_k=64, row_block_warps=2, whole_tiles=True, min_stages=3),
    TileCandidate(block_m=64, block_n=192, block_k=128, row_block_warps=4, cluster=5, min_k_tiles=16),
    TileCandidate(block_m=32, block_n=192, block_k=256, row_block_warps=4, cluster=2, min_stages=3),
    TileCandidate(block_m=32, block_n=512, block_k=128, cluster=2, min_stages=3),
)


class WgmmaWsFamily(KernelFamily):
    """One producer warpgroup issues TMA loads; consumer warpgroups dequantize and multiply.

    A CTA computes whole tiles, clusters share tiles, or stream-K splits the last tiles.
    """

    name = "wgmma_ws"
    source, function = "gemm_sm90_ws.cu", "nested_gemm_sm90_ws"
    wgmma = True
    persistent = True

    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        if not uses_wgmma(shape, device):
            return False
        return shape.tokens > GEMM_MAX_M or self.find(shape, device) is not None

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        return [*_full_waves(shape, device), *(_with_stream_k(shape) if shape.tokens > GEMM_MAX_M else ())]

    def spills(self, shape: GemmShape, tile: TileCandidate) -> bool:
        zeros, units, planes = shape.format.has_zero_points, tile.block_k // TILE, shape.planes
        stream_k = tile.cluster == 1 and not tile.whole_tiles
        if tile.block_m == 256:
            few_or_all = (planes, shape.dtype) in ((2, torch.float16), (8, torch.bfloat16))
            return units == 1 and (few_or_all or (stream_k and zeros and planes >= 6))
        if tile.row_block_warps == 4:
            return False
        if stream_k and shape.bits == 2 and not zeros:
            return True
        if units > 1:
            return planes + zeros >= 6
        return shape.dtype == torch.bfloat16 and planes + 2 * zeros >= 8

    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        weights = _aligned(tile.row_blocks * weight_stage_bytes(shape, tile))
        stages = tile.stages * (tile.block_m * tile.block_k * 2 + weights)
        barriers = 2 * tile.stages + (tile.cluster > 1)
        return _aligned(max(stages, cluster_bytes(tile)) + 8 * barriers)

    def defines(self, tile: TileConfig) -> dict[str, int]:
        return super().defines(tile) | {"WHOLE_TILES": int(tile.whole_tiles)}

    def threads(self, tile: TileConfig) -> int:
        return WARP * (tile.mma_warps + _PRODUCER_WARPS)

    def tma_descriptors(self, shape: GemmShape, tile: TileConfig) -> TmaDescriptors | None:
        row_tiles, units = tiles(shape.rows), tiles(shape.depth)
        all_groups = stored_group_count(shape.depth, shape.format.group_size)
        groups = tile.block_k // shape.group if 0 < shape.group < tile.block_k else 1
        planes = TmaDescriptor(
            8, (shape.planes, row_tiles, 64 * units), (shape.planes, tile.row_blocks, 64 * tile.k_units)
        )
        scales = TmaDescriptor(8, (all_groups, 16 * row_tiles), (groups, 16 * tile.row_blocks))
        zeros = TmaDescriptor(8, (all_groups, 8 * row_tiles), (groups, 8 * tile.row_blocks))
        return planes, scales, zeros, x_descriptor(shape, tile)


def _aligned(size: int) -> int:
    return -(-size // _TMA_ALIGNMENT) * _TMA_ALIGNMENT


def _full_waves(shape: GemmShape, device: DeviceLimits) -> list[TileCandidate]:
    """Candidates without stream-K for a shape: more than half of a tile has tokens, and few tokens have small tiles."""
    few = shape.tokens <= GEMM_MAX_M
    fitting = (tile for tile in _FULL_WAVES if tile.block_m < 2 * shape.tokens and (tile.block_m <= GEMM_MAX_M) == few)
    return [tile for tile in fitting if is_meant_for(shape, tile) and _fills_waves(shape, device, tile)]


def _fills_waves(shape: GemmShape, device: DeviceLimits, tile: TileCandidate) -> bool:
    """Return True if clusters fill one wave, or whole tiles fill waves."""
    ctas = cta_count(shape, tile)
    waves = -(-ctas // device.multiprocessors)
    share = ctas / (waves * device.multiprocessors)
    if tile.cluster > 1:
        return device.clusters and waves == 1 and share >= _MIN_SHARE
    if waves <= _FEW_WAVES:
        return share >= _MIN_SHARE
    return tile.block_m == _LONG_M and share >= _MIN_SHARE_OF_MANY


def _with_stream_k(shape: GemmShape) -> Sequence[TileCandidate]:
    """Candidates whose last tiles stream-K splits."""
    weights = shape.rows * shape.depth
    if weights <= _SMALL_WEIGHTS and shape.tokens <= _SMALL_MAX_M:
        return _SHORT
    short, long = (-(-shape.tokens // block_m) * block_m for block_m in (128, 256))
    if short > _SHORT_WORTH * long:
        return _LONG
    return _SHORT_LARGE if weights >= LARGE_WEIGHTS or shape.tokens > 128 else _SHORT
