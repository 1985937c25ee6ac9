"""Kernel family by WGMMA for 17 to 64 tokens, on sm_90a."""

from collections.abc import Sequence

import torch

from matquant.cuda.tma import TmaDescriptor
from matquant.formats.tile_layout import TILE
from matquant.inference.gemm_shape import DeviceLimits, GemmShape, folds_zero_point_exactly
from matquant.inference.kernel_families.base import (
    KernelFamily,
    TileCandidate,
    TileConfig,
    TmaDescriptors,
    needs_few_registers,
    registers_per_thread,
)
from matquant.inference.kernel_families.mma import (
    GEMM_MAX_M,
    by_matrix_size,
    cluster_exchange_bytes,
    exchange_bytes,
    one_wave,
    ring_bytes,
    x_bytes,
    x_stages,
)

WGMMA_MIN_M = 17  # tokens; mma.sync is as fast or faster for fewer

_REGISTERS = 100  # of a thread: fewer do for some formats alone

# Candidates by block_m, as in ``mma``.
_FALLBACK = (
    TileCandidate(block_n=256, block_k=128, warps_k=2),
    TileCandidate(block_n=64, block_k=64, row_block_warps=4),
)
_NARROW = {
    32: (TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=4), *_FALLBACK),
    64: (
        TileCandidate(block_n=64, block_k=128, row_block_warps=4, warps_k=4),
        TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=2),
        *_FALLBACK,
    ),
}
_WIDE = {
    32: _FALLBACK,
    64: (
        TileCandidate(block_n=128, block_k=256, row_block_warps=2, ctas_per_sm=2),
        TileCandidate(block_n=256, block_k=256, row_block_warps=2),
        TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=2),
        *_FALLBACK,
    ),
}
_LARGE = {
    32: (TileCandidate(block_n=512, block_k=256), *_FALLBACK),
    64: (
        TileCandidate(block_n=512, block_k=256, min_stages=3),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=2),
        *_WIDE[64][1:],
    ),
}
# As in ``mma``.
_ONE_WAVE = {
    32: (
        TileCandidate(block_n=512, block_k=256, cluster=2),
        TileCandidate(block_n=512, block_k=128, cluster=2),
        TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=4, cluster=2),
        TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=2, cluster=2),
        TileCandidate(block_n=64, block_k=256, row_block_warps=4, warps_k=4, cluster=2),
        TileCandidate(block_n=64, block_k=128, row_block_warps=4, warps_k=4, cluster=2, max_k_tiles=8),
        TileCandidate(block_n=448, block_k=256, row_block_warps=4, cluster=8),
        TileCandidate(block_n=448, block_k=128, row_block_warps=4, cluster=8),
        TileCandidate(block_n=256, block_k=128, warps_k=2, cluster=2),
        TileCandidate(block_n=256, block_k=64, warps_k=2, cluster=2),
    ),
    64: (
        TileCandidate(block_n=448, block_k=128, row_block_warps=4, cluster=8),
        TileCandidate(block_n=128, block_k=128, row_block_warps=2, warps_k=2, cluster=2),
        TileCandidate(block_n=64, block_k=256, row_block_warps=4, warps_k=2, cluster=2),
        TileCandidate(block_n=64, block_k=128, row_block_warps=4, warps_k=2, cluster=2, max_k_tiles=8),
        TileCandidate(block_n=512, block_k=128, cluster=2),
        TileCandidate(block_n=512, block_k=64, cluster=2),
        TileCandidate(block_n=256, block_k=256, row_block_warps=2, cluster=2),
        TileCandidate(block_n=512, block_k=64, cluster=4, max_k_tiles=32),
    ),
}


class WgmmaFamily(KernelFamily):
    """Split-K with WGMMA; weights through a cp.async ring, activations through TMA."""

    name = "wgmma"
    source, function = "gemm.cu", "nested_gemm"
    wgmma = True

    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        return uses_wgmma(shape, device) and shape.tokens <= GEMM_MAX_M

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        by_size = by_matrix_size(shape, device, _NARROW, _WIDE, _LARGE)
        return [*one_wave(shape, device, _ONE_WAVE, by_size[0].block_m, by_size[0].x_rows), *by_size]

    def spills(self, shape: GemmShape, tile: TileCandidate) -> bool:
        small_groups = 0 < shape.group < TILE
        if registers_per_thread(tile) < _REGISTERS and not needs_few_registers(shape):
            return True
        # All eight planes take one more operand fragment in float16, two in bfloat16.
        fragments = 0 if shape.planes < 8 else 1 if shape.dtype == torch.float16 else 2
        pressure = small_groups + shape.format.has_zero_points + fragments
        return tile.block_m // 8 >= 8 * tile.row_block_warps and pressure > 1

    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        barriers = -(-8 * x_stages(tile) // 16) * 16
        exchange = exchange_bytes(tile) + cluster_exchange_bytes(tile)
        return x_bytes(tile, padding=0) + ring_bytes(shape, tile) + exchange + barriers

    def tma_descriptors(self, shape: GemmShape, tile: TileConfig) -> TmaDescriptors | None:
        return None, None, None, x_descriptor(shape, tile)


def uses_wgmma(shape: GemmShape, device: DeviceLimits) -> bool:
    """Return True if WGMMA computes the shape, exactly, and faster than ``mma.sync``."""
    return device.wgmma and shape.tokens >= WGMMA_MIN_M and folds_zero_point_exactly(shape)


def x_descriptor(shape: GemmShape, tile: TileConfig) -> TmaDescriptor:
    """TMA descriptor of the activations, in boxes of block_m tokens and 64 columns with a 128-byte swizzle."""
    depth = -(-shape.depth // 8) * 8
    return TmaDescriptor(2, (shape.tokens, depth), (tile.block_m, TILE), swizzle_128b=True)
