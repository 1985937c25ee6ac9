"""Tile configurations that ``bench_kernels.py --candidates`` times beside the chosen one."""

import itertools
from collections.abc import Iterator
from typing import Any

from matquant.formats.tile_layout import tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families import FAMILIES, choose_tile_config
from matquant.inference.kernel_families.base import TileConfig
from matquant.inference.kernel_families.mma import GEMM_MAX_M


def _tile(
    *,
    block_n: int,
    block_k: int,
    row_block_warps: int = 1,
    warps_k: int = 1,
    x_stage_tiles: int = 1,
    ctas_per_sm: int = 1,
) -> dict[str, int]:
    """Fields of ``TileConfig`` but ``block_m``, ``stages`` and those that all candidates of the tables share."""
    return {
        "block_n": block_n,
        "block_k": block_k,
        "row_block_warps": row_block_warps,
        "warps_k": warps_k,
        "x_stage_tiles": x_stage_tiles,
        "ctas_per_sm": ctas_per_sm,
    }


# Candidates by block_m.
MMA_CANDIDATES = {
    8: [
        _tile(block_n=512, block_k=128, x_stage_tiles=4, ctas_per_sm=3),
        _tile(block_n=512, block_k=64, x_stage_tiles=4, ctas_per_sm=3),
        _tile(block_n=512, block_k=128, x_stage_tiles=8, ctas_per_sm=2),
        _tile(block_n=512, block_k=256, x_stage_tiles=4, ctas_per_sm=2),
        _tile(block_n=1024, block_k=128, x_stage_tiles=8),
        _tile(block_n=1024, block_k=256, x_stage_tiles=4),
        _tile(block_n=256, block_k=128, warps_k=2, x_stage_tiles=2, ctas_per_sm=3),
        _tile(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4, ctas_per_sm=2),
        _tile(block_n=256, block_k=64, warps_k=2, x_stage_tiles=4, ctas_per_sm=2),
        _tile(block_n=512, block_k=128, warps_k=2, x_stage_tiles=4),
        _tile(block_n=128, block_k=128, warps_k=4, ctas_per_sm=3),
        _tile(block_n=128, block_k=64, warps_k=4, x_stage_tiles=2, ctas_per_sm=2),
        _tile(block_n=64, block_k=128, warps_k=8, ctas_per_sm=2),
        _tile(block_n=64, block_k=128, warps_k=8, ctas_per_sm=3),
        _tile(block_n=64, block_k=64, warps_k=8, x_stage_tiles=2, ctas_per_sm=2),
        _tile(block_n=64, block_k=64, warps_k=4, x_stage_tiles=2, ctas_per_sm=4),
        _tile(block_n=128, block_k=64, warps_k=2, x_stage_tiles=2, ctas_per_sm=4),
        _tile(block_n=128, block_k=64, warps_k=8, x_stage_tiles=2),
    ],
    16: [
        _tile(block_n=512, block_k=128, x_stage_tiles=4),
        _tile(block_n=512, block_k=256, x_stage_tiles=2),
        _tile(block_n=512, block_k=128, x_stage_tiles=4, ctas_per_sm=2),
        _tile(block_n=512, block_k=256, x_stage_tiles=2, ctas_per_sm=2),
        _tile(block_n=256, block_k=128, warps_k=2, x_stage_tiles=2, ctas_per_sm=2),
        _tile(block_n=256, block_k=128, warps_k=2, x_stage_tiles=4),
        _tile(block_n=128, block_k=256, warps_k=4),
        _tile(block_n=128, block_k=128, warps_k=4),
        _tile(block_n=128, block_k=128, warps_k=4, ctas_per_sm=2),
        _tile(block_n=128, block_k=64, warps_k=4),
        _tile(block_n=64, block_k=64, warps_k=8, ctas_per_sm=2),
    ],
    32: [
        _tile(block_n=512, block_k=128, x_stage_tiles=2),
        _tile(block_n=256, block_k=128, warps_k=2),
        _tile(block_n=256, block_k=64, warps_k=2, x_stage_tiles=2),
        _tile(block_n=128, block_k=128, warps_k=4),
        _tile(block_n=128, block_k=64, warps_k=4),
        _tile(block_n=256, block_k=128, row_block_warps=2, warps_k=2),
        _tile(block_n=256, block_k=128, x_stage_tiles=2, ctas_per_sm=2),
        _tile(block_n=512, block_k=128, row_block_warps=2, x_stage_tiles=2),
    ],
    64: [
        _tile(block_n=256, block_k=128, row_block_warps=2),
        _tile(block_n=256, block_k=64, row_block_warps=2, x_stage_tiles=2),
        _tile(block_n=128, block_k=128, row_block_warps=2, warps_k=2),
        _tile(block_n=128, block_k=128, row_block_warps=4, warps_k=2),
        _tile(block_n=256, block_k=128, row_block_warps=4),
    ],
}
WGMMA_CANDIDATES = {
    16: [
        _tile(block_n=128, block_k=128, row_block_warps=2, warps_k=4),
        _tile(block_n=256, block_k=128, warps_k=4),
        _tile(block_n=512, block_k=256),
        _tile(block_n=256, block_k=256, ctas_per_sm=2),
        _tile(block_n=256, block_k=128, warps_k=2, x_stage_tiles=2),
    ],
    32: [
        _tile(block_n=128, block_k=128, row_block_warps=2, warps_k=4),
        _tile(block_n=256, block_k=128, warps_k=2),
        _tile(block_n=64, block_k=128, row_block_warps=4, warps_k=4),
        _tile(block_n=512, block_k=256),
        _tile(block_n=512, block_k=128, x_stage_tiles=2),
        _tile(block_n=256, block_k=256, ctas_per_sm=2),
        _tile(block_n=256, block_k=128, warps_k=4),
        _tile(block_n=256, block_k=256, row_block_warps=2, ctas_per_sm=2),
        _tile(block_n=256, block_k=128, row_block_warps=2, warps_k=2),
    ],
    64: [
        _tile(block_n=64, block_k=128, row_block_warps=4, warps_k=4),
        _tile(block_n=128, block_k=128, row_block_warps=4, warps_k=2),
        _tile(block_n=128, block_k=128, row_block_warps=2, warps_k=2),
        _tile(block_n=512, block_k=256),
        _tile(block_n=512, block_k=128, x_stage_tiles=2),
        _tile(block_n=256, block_k=256, ctas_per_sm=2),
        _tile(block_n=256, block_k=256, row_block_warps=2),
        _tile(block_n=256, block_k=128, row_block_warps=2, warps_k=2),
        _tile(block_n=128, block_k=128, row_block_warps=2, warps_k=4),
        _tile(block_n=256, block_k=128, warps_k=2),
        _tile(block_n=128, block_k=256, row_block_warps=2, ctas_per_sm=2),
    ],
}
# For more than ``GEMM_MAX_M`` tokens: block_m and the other fields.
WGMMA_WS_CANDIDATES = [
    (128, _tile(block_n=256, block_k=128, row_block_warps=2)),
    (128, _tile(block_n=256, block_k=64, row_block_warps=2)),
    (128, _tile(block_n=128, block_k=128, row_block_warps=4)),
    (128, _tile(block_n=128, block_k=256, row_block_warps=4)),
    (256, _tile(block_n=128, block_k=64, row_block_warps=4)),
    (256, _tile(block_n=128, block_k=128, row_block_warps=4)),
]
_MMA_MAX_M = 16  # tokens that WGMMA is not used for
_MIN_WAVE = 0.84
_MIN_WAVE_OF_LARGE_TILES = 0.72
_MAX_ACCUMULATORS = {8: 32, 12: 16, 16: 8}  # of a thread, by consumer warps
_MAX_STAGES = 6
_RESERVED_BYTES = 1024  # shared memory that each CTA costs beside its own


def _from_tables(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Family, and fields, of each candidate of the tables for a shape."""
    x_rows = {"x_rows": 1} if shape.tokens == 1 else {}
    if shape.tokens > GEMM_MAX_M:
        for block_m, fields in WGMMA_WS_CANDIDATES:
            if block_m < 2 * shape.tokens:
                yield "wgmma_ws", fields | {"block_m": block_m}
        return
    for family, table in (("mma", MMA_CANDIDATES), ("wgmma", WGMMA_CANDIDATES if device.wgmma else {})):
        if table:
            block_m = next(size for size in sorted(table) if shape.tokens <= size)
            yield from ((family, fields | {"block_m": block_m} | x_rows) for fields in table[block_m])


def _one_wave(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Family, and fields, of the tiles without stream-K whose CTAs fill at least 84 % of one wave."""
    family = "mma" if shape.tokens <= _MMA_MAX_M or not device.wgmma else "wgmma"
    block_m = next(count for count in (8, 16, 32, 64) if shape.tokens <= count)
    split = (1, 2, 4) if family == "wgmma" else (1,)
    sizes = itertools.product(range(1, 9), split, (1, 2, 4, 8), range(1, 9), range(1, 5), (1, 2, 4))
    for row_blocks, row_block_warps, warps_k, cluster, ctas_per_sm, units in sizes:
        warps = row_blocks * row_block_warps * warps_k
        ctas = -(-tiles(shape.rows) // row_blocks) * cluster
        k_tiles = -(-tiles(shape.depth) // (units * warps_k * cluster))
        few_registers = block_m // 8 * warps * ctas_per_sm // row_block_warps > 32  # for the accumulators
        if (
            warps * ctas_per_sm > 32
            or not warps * ctas_per_sm >= 8
            or few_registers
            or (family == "wgmma" and row_blocks * row_block_warps % 4)
        ):
            continue
        if _MIN_WAVE <= ctas / (device.multiprocessors * ctas_per_sm) <= 1:
            fields = _tile(
                block_n=64 * row_blocks,
                block_k=64 * units,
                row_block_warps=row_block_warps,
                warps_k=warps_k,
                x_stage_tiles=1 if family == "wgmma" else min(4 if block_m == 8 else 2, 1 << k_tiles.bit_length() - 1),
                ctas_per_sm=ctas_per_sm,
            )
            schedule = {"cluster": cluster, "whole_tiles": cluster == 1}
            yield family, fields | schedule | {"block_m": block_m, "x_rows": 1 if shape.tokens == 1 else block_m}


def _full_waves(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Family, and fields, of the warp-specialized tiles that fill the device: clusters one wave, whole tiles several."""
    sizes = (32, 64) if shape.tokens <= GEMM_MAX_M else (128, 256)
    for block_m, row_blocks, row_block_warps, cluster, units in itertools.product(
        sizes, (2, 3, 4, 6, 8, 12), (1, 2, 4), range(1, 9), (1, 2, 4)
    ):
        warps = row_blocks * row_block_warps
        accumulators = 4 // row_block_warps * block_m // 8  # of a thread, 4 registers each
        output_tiles = -(-tiles(shape.rows) // row_blocks) * -(-shape.tokens // block_m)
        waves = -(-output_tiles * cluster // device.multiprocessors)
        share = output_tiles * cluster / (waves * device.multiprocessors)
        if accumulators > _MAX_ACCUMULATORS.get(warps, 0) or (cluster > 1 and waves > 1):
            continue
        if share >= _MIN_WAVE_OF_LARGE_TILES and block_m < 2 * shape.tokens:
            fields = _tile(block_n=64 * row_blocks, block_k=64 * units, row_block_warps=row_block_warps)
            yield "wgmma_ws", fields | {"block_m": block_m, "cluster": cluster, "whole_tiles": cluster == 1}


def tile_configs(shape: GemmShape, device: DeviceLimits, *, candidates: bool) -> list[TileConfig]:
    """Return the chosen tile configuration, and then the candidates that fit, with as many stages as there is room for."""
    found = [choose_tile_config(shape, device)]
    tables = list(_from_tables(shape, device)) if candidates else []
    if candidates and device.clusters and shape.tokens <= GEMM_MAX_M:
        tables += _one_wave(shape, device)
    if candidates and device.clusters and device.wgmma and shape.tokens > _MMA_MAX_M:
        tables += _full_waves(shape, device)
    for family, fields in tables:
        fitting = (TileConfig(family=family, stages=stages, **fields) for stages in range(_MAX_STAGES, 1, -1))
        found += itertools.islice((tile for tile in fitting if _fits(shape, device, tile)), 1)
    return list(dict.fromkeys(found))


def _fits(shape: GemmShape, device: DeviceLimits, tile: TileConfig) -> bool:
    needed = FAMILIES[tile.family].shared_bytes(shape, tile) + _RESERVED_BYTES
    return tile.ctas_per_sm * needed <= device.shared_bytes
