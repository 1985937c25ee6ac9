"""Kernel family by ``mma.sync``, for up to 64 tokens on any device from sm_80 on."""

import dataclasses
from collections.abc import Mapping, Sequence

from matquant.formats.tile_layout import TILE, tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import (
    LOAD_BYTES,
    WARP,
    KernelFamily,
    TileCandidate,
    TileConfig,
    TmaDescriptors,
    k_tiles_per_cta,
    needs_few_registers,
    registers_per_thread,
    weight_stage_bytes,
)

GEMM_MAX_M = 64  # tokens of one launch of ``kernels/gemm.cu``
LARGE_WEIGHTS = 2**27  # weights of a large matrix

# Candidates by block_m, the best first: for matrices whose tiles of 64 rows are fewer than half of the device's multiprocessors
# (narrow), for the others (wide), and for large ones. Measured on an H200, see experiments/results/kernels. The last
# candidates are for devices with less shared memory.
_FALLBACK = (
    TileCandidate(block_n=64, block_k=64, warps_k=4, ctas_per_sm=2),
    TileCandidate(block_n=64, block_k=64, warps_k=2, ctas_per_sm=2),
    TileCandidate(block_n=64, block_k=64),
)
_FALLBACK_32 = (
    TileCandidate(block_n=256, block_k=64, row_block_warps=2, x_stage_tiles=2),
    TileCandidate(block_n=256, block_k=64),
    TileCandidate(block_n=128, block_k=64),
    TileCandidate(block_n=64, block_k=64, row_block_warps=2),
)
_NARROW = {
    8: (
        TileCandidate(block_n=64, block_k=128, warps_k=8, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=128, warps_k=4, ctas_per_sm=2, min_stages=3),
        TileCandidate(block_n=64, block_k=64, warps_k=8, x_stage_tiles=2, ctas_per_sm=2),
        TileCandidate(block_n=128, block_k=64, warps_k=8, x_stage_tiles=2),
        *_FALLBACK,
    ),
    16: (
        TileCandidate(block_n=128, block_k=128, warps_k=4),
        TileCandidate(block_n=128, block_k=64, warps_k=4),
        *_FALLBACK,
    ),
    32: (
        TileCandidate(block_n=128, block_k=128, warps_k=4),
        TileCandidate(block_n=256, block_k=128, warps_k=2),
        TileCandidate(block_n=256, block_k=64, warps_k=2, x_stage_tiles=2),
        *_FALLBACK_32,
    ),
    64: (
        TileCandidate(block_n=256, block_k=128, row_block_warps=2),
        TileCandidate(block_n=256, block_k=64, row_block_warps=2, x_stage_tiles=2),
        TileCandidate(block_n=128, block_k=64, row_block_warps=4),
        TileCandidate(block_n=64, block_k=64, row_block_warps=2),
    ),
}
_WIDE = {
    8: (
        TileCandidate(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4, ctas_per_sm=2),
        TileCandidate(block_n=512, block_k=128, warps_k=2, x_stage_tiles=4),
        TileCandidate(block_n=256, block_k=64, warps_k=2, x_stage_tiles=4, ctas_per_sm=2),
        *_FALLBACK,
    ),
    16: (
        TileCandidate(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=4),
        TileCandidate(block_n=256, block_k=64),
        *_FALLBACK,
    ),
    32: (
        TileCandidate(block_n=256, block_k=128, warps_k=2),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=2),
        *_FALLBACK_32,
    ),
    64: _NARROW[64],
}
_LARGE = {
    8: (
        TileCandidate(block_n=1024, block_k=256, x_stage_tiles=4),
        TileCandidate(block_n=1024, block_k=128, x_stage_tiles=8),
        *_WIDE[8],
    ),
    16: (
        TileCandidate(block_n=512, block_k=256, x_stage_tiles=2),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=4),
        *_WIDE[16],
    ),
    32: (TileCandidate(block_n=512, block_k=128, x_stage_tiles=2), *_FALLBACK_32),
    64: _NARROW[64],
}


# Candidates without stream-K by tokens in shared memory, the best first, for devices with clusters. One is used for matrices of
# which its CTAs fill one wave (``fills_wave``). Measured on an H100, see experiments/results/kernels.
_ONE_WAVE = {
    1: (
        TileCandidate(block_n=64, block_k=128, warps_k=8, x_stage_tiles=4, cluster=2),
        TileCandidate(block_n=64, block_k=64, warps_k=8, x_stage_tiles=4, cluster=2),
        TileCandidate(block_n=64, block_k=128, warps_k=8, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=64, block_k=64, warps_k=8, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=64, block_k=128, warps_k=4, x_stage_tiles=2, ctas_per_sm=3, cluster=4, max_planes=3),
        TileCandidate(block_n=448, block_k=128, warps_k=2, x_stage_tiles=2, cluster=8),
        TileCandidate(block_n=448, block_k=64, warps_k=2, x_stage_tiles=4, cluster=8),
        TileCandidate(block_n=128, block_k=128, warps_k=4, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=128, block_k=64, warps_k=4, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=256, block_k=64, warps_k=4, x_stage_tiles=4, whole_tiles=True),
    ),
    8: (
        TileCandidate(block_n=64, block_k=128, warps_k=8, x_stage_tiles=4, cluster=2),
        TileCandidate(block_n=64, block_k=64, warps_k=8, x_stage_tiles=4, cluster=2),
        TileCandidate(block_n=128, block_k=64, warps_k=2, x_stage_tiles=4, ctas_per_sm=3, cluster=8, max_planes=3),
        TileCandidate(block_n=448, block_k=128, warps_k=2, x_stage_tiles=2, cluster=8),
        TileCandidate(block_n=448, block_k=64, warps_k=2, x_stage_tiles=4, cluster=8),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=4, ctas_per_sm=2, cluster=8, max_k_tiles=8, min_stages=3),
        TileCandidate(block_n=512, block_k=128, x_stage_tiles=4, cluster=4, max_k_tiles=16),
        TileCandidate(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4, ctas_per_sm=2, cluster=2),
        TileCandidate(block_n=512, block_k=64, x_stage_tiles=4, ctas_per_sm=2, cluster=4),
    ),
    16: (
        TileCandidate(block_n=448, block_k=128, warps_k=2, x_stage_tiles=2, cluster=8),
        TileCandidate(block_n=448, block_k=64, warps_k=2, x_stage_tiles=2, cluster=8, max_planes=5),
        TileCandidate(block_n=128, block_k=128, warps_k=4, x_stage_tiles=2, cluster=2),
        TileCandidate(block_n=128, block_k=64, warps_k=4, x_stage_tiles=2, cluster=2),
        TileCandidate(block_n=256, block_k=128, warps_k=4, x_stage_tiles=2, cluster=2),
        TileCandidate(block_n=256, block_k=128, warps_k=2, x_stage_tiles=2, cluster=2),
        TileCandidate(block_n=512, block_k=128, warps_k=2, x_stage_tiles=2, cluster=2),
        TileCandidate(block_n=256, block_k=128, x_stage_tiles=2, ctas_per_sm=2, cluster=2),
    ),
}
_REGISTERS_OF_16_TOKENS = 160  # that any format needs
_MBARRIER_BYTES = 16  # with padding
_MIN_WAVE_SHARE = 0.83  # of the resident CTAs that have work


class MmaFamily(KernelFamily):
    """Split-K with ``mma.m16n8k16``; weights and activations through cp.async pipelines."""

    name = "mma"
    source, function = "gemm.cu", "nested_gemm"
    wgmma = False

    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        return shape.tokens <= GEMM_MAX_M

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        by_size = by_matrix_size(shape, device, _NARROW, _WIDE, _LARGE)
        if shape.rows * shape.depth >= LARGE_WEIGHTS:
            return by_size
        return [*one_wave(shape, device, _ONE_WAVE, by_size[0].block_m, by_size[0].x_rows), *by_size]

    def spills(self, shape: GemmShape, tile: TileCandidate) -> bool:
        small_groups = 0 < shape.group < TILE
        token_tiles, units = tile.block_m // 8, tile.block_k // TILE
        if token_tiles == 2 and registers_per_thread(tile) < _REGISTERS_OF_16_TOKENS and not needs_few_registers(shape):
            return True
        return small_groups and (
            units > 2 or (token_tiles > 2 and (units > 1 or tile.row_block_warps < token_tiles // 2))
        )

    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        groups = tile.block_k // (shape.group if 0 < shape.group < tile.block_k else tile.block_k)
        ring, x, exchange = ring_bytes(shape, tile), x_bytes(tile, padding=8), exchange_bytes(tile)
        own_sums = tile.token_tiles * tile.row_block_warps <= 2
        x_sums = 0 if own_sums else tile.x_stage_tiles * tile.warps_k * groups * tile.block_m * 4
        return x + ring + exchange + cluster_exchange_bytes(tile) + x_sums

    def tma_descriptors(self, shape: GemmShape, tile: TileConfig) -> TmaDescriptors | None:
        return None


def one_wave(
    shape: GemmShape, device: DeviceLimits, table: Mapping[int, Sequence[TileCandidate]], block_m: int, x_rows: int
) -> list[TileCandidate]:
    """Candidates of the table for ``x_rows`` tokens whose CTAs fill one wave of the device."""
    if not device.clusters:
        return []
    tiles_of_table = (dataclasses.replace(tile, block_m=block_m, x_rows=x_rows) for tile in table.get(x_rows, ()))
    return [tile for tile in tiles_of_table if fills_wave(shape, device, tile)]


def fills_wave(shape: GemmShape, device: DeviceLimits, tile: TileCandidate) -> bool:
    """Return True if the CTAs are about as many as are resident, and each has as many k-tiles as the candidate is for."""
    share = cta_count(shape, tile) / (device.multiprocessors * tile.ctas_per_sm)
    return _MIN_WAVE_SHARE <= share <= 1 and is_meant_for(shape, tile)


def cta_count(shape: GemmShape, tile: TileCandidate) -> int:
    """CTAs without stream-K: one for each output tile, or a cluster."""
    return -(-tiles(shape.rows) * TILE // tile.block_n) * -(-shape.tokens // tile.block_m) * tile.cluster


def is_meant_for(shape: GemmShape, tile: TileCandidate) -> bool:
    """Return True if a CTA has as many k-tiles, and the weight as many planes, as the candidate is for."""
    k_tiles = k_tiles_per_cta(shape, tile)
    few_planes = shape.planes <= (tile.max_planes or shape.planes)
    return max(tile.x_stage_tiles, tile.min_k_tiles) <= k_tiles <= (tile.max_k_tiles or k_tiles) and few_planes


def by_matrix_size(
    shape: GemmShape,
    device: DeviceLimits,
    narrow: dict[int, tuple[TileCandidate, ...]],
    wide: dict[int, tuple[TileCandidate, ...]],
    large: dict[int, tuple[TileCandidate, ...]],
) -> list[TileCandidate]:
    """Candidates of the table for a matrix's size, for the smallest ``block_m`` that holds all tokens."""
    if 2 * tiles(shape.rows) < device.multiprocessors:
        table = narrow
    elif shape.rows * shape.depth >= LARGE_WEIGHTS:
        table = large
    else:
        table = wide
    block_m = next(m for m in table if shape.tokens <= m)
    x_rows = 1 if shape.tokens == 1 else block_m  # WGMMA is for more tokens
    return [dataclasses.replace(tile, block_m=block_m, x_rows=x_rows) for tile in table[block_m]]


def ring_bytes(shape: GemmShape, tile: TileConfig) -> int:
    """Bytes of the weight pipelines of all warps."""
    return tile.warps_k * tile.row_blocks * tile.stages * weight_stage_bytes(shape, tile)


def x_stages(tile: TileConfig) -> int:
    """Pipeline stages of activations in shared memory: one in use, the others in flight."""
    return 1 + -(-(tile.stages - 1) // tile.x_stage_tiles)


def x_bytes(tile: TileConfig, padding: int) -> int:
    """Bytes of all stages of activations; rows are padded by ``padding`` elements."""
    return x_stages(tile) * tile.x_stage_tiles * tile.x_rows * (tile.block_k * tile.warps_k + padding) * 2


def exchange_bytes(tile: TileConfig) -> int:
    """Bytes through which K warps reduce their accumulators."""
    if tile.warps_k == 1:
        return 0
    return tile.warps_k * tile.row_blocks * 4 * tile.token_tiles * WARP * LOAD_BYTES


def cluster_bytes(tile: TileConfig) -> int:
    """Bytes of the partial sums that a CTA of a cluster receives."""
    if tile.cluster == 1:
        return 0
    shares = -(-4 // tile.row_block_warps * tile.token_tiles // tile.cluster)
    return tile.cluster * tile.row_blocks * tile.row_block_warps * shares * WARP * LOAD_BYTES


def cluster_exchange_bytes(tile: TileConfig) -> int:
    """Bytes through which the CTAs of a cluster reduce their accumulators: partial sums, and an mbarrier."""
    return cluster_bytes(tile) + _MBARRIER_BYTES * (tile.cluster > 1)
