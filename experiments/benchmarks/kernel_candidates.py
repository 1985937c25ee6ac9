"""Tile configurations that ``bench_kernels.py --candidates`` times beside the chosen one."""

import itertools
from collections.abc import Iterator
from typing import Any

from matquant.formats.tile_layout import tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families import FAMILIES, choose_tile_config
from matquant.inference.kernel_families.base import TileConfig
from matquant.inference.kernel_families.mma import GEMM_MAX_M

# (warps_n, warps_m, warps_k, units of 64 columns, x_panel, ctas_per_sm) by tiles of 8 tokens.
MMA_CANDIDATES = {
    1: [
        (8, 1, 1, 2, 4, 3),
        (8, 1, 1, 1, 4, 3),
        (8, 1, 1, 2, 8, 2),
        (8, 1, 1, 4, 4, 2),
        (16, 1, 1, 2, 8, 1),
        (16, 1, 1, 4, 4, 1),
        (4, 1, 2, 2, 2, 3),
        (4, 1, 2, 2, 4, 2),
        (4, 1, 2, 1, 4, 2),
        (8, 1, 2, 2, 4, 1),
        (2, 1, 4, 2, 1, 3),
        (2, 1, 4, 1, 2, 2),
        (1, 1, 8, 2, 1, 2),
        (1, 1, 8, 2, 1, 3),
        (1, 1, 8, 1, 2, 2),
        (1, 1, 4, 1, 2, 4),
        (2, 1, 2, 1, 2, 4),
        (2, 1, 8, 1, 2, 1),
    ],
    2: [
        (8, 1, 1, 2, 4, 1),
        (8, 1, 1, 4, 2, 1),
        (8, 1, 1, 2, 4, 2),
        (8, 1, 1, 4, 2, 2),
        (4, 1, 2, 2, 2, 2),
        (4, 1, 2, 2, 4, 1),
        (2, 1, 4, 4, 1, 1),
        (2, 1, 4, 2, 1, 1),
        (2, 1, 4, 2, 1, 2),
        (2, 1, 4, 1, 1, 1),
        (1, 1, 8, 1, 1, 2),
    ],
    4: [
        (8, 1, 1, 2, 2, 1),
        (4, 1, 2, 2, 1, 1),
        (4, 1, 2, 1, 2, 1),
        (2, 1, 4, 2, 1, 1),
        (2, 1, 4, 1, 1, 1),
        (4, 2, 2, 2, 1, 1),
        (4, 1, 1, 2, 2, 2),
        (8, 2, 1, 2, 2, 1),
    ],
    8: [(4, 2, 1, 2, 1, 1), (4, 2, 1, 1, 2, 1), (2, 2, 2, 2, 1, 1), (2, 4, 2, 2, 1, 1), (4, 4, 1, 2, 1, 1)],
}
WGMMA_CANDIDATES = {
    2: [(2, 2, 4, 2, 1, 1), (4, 1, 4, 2, 1, 1), (8, 1, 1, 4, 1, 1), (4, 1, 1, 4, 1, 2), (4, 1, 2, 2, 2, 1)],
    4: [
        (2, 2, 4, 2, 1, 1),
        (4, 1, 2, 2, 1, 1),
        (1, 4, 4, 2, 1, 1),
        (8, 1, 1, 4, 1, 1),
        (8, 1, 1, 2, 2, 1),
        (4, 1, 1, 4, 1, 2),
        (4, 1, 4, 2, 1, 1),
        (4, 2, 1, 4, 1, 2),
        (4, 2, 2, 2, 1, 1),
    ],
    8: [
        (1, 4, 4, 2, 1, 1),
        (2, 4, 2, 2, 1, 1),
        (2, 2, 2, 2, 1, 1),
        (8, 1, 1, 4, 1, 1),
        (8, 1, 1, 2, 2, 1),
        (4, 1, 1, 4, 1, 2),
        (4, 2, 1, 4, 1, 1),
        (4, 2, 2, 2, 1, 1),
        (2, 2, 4, 2, 1, 1),
        (4, 1, 2, 2, 1, 1),
        (2, 2, 1, 4, 1, 2),
    ],
}
# The same after the number of tiles of 8 tokens, for more than ``GEMM_MAX_M`` tokens.
WGMMA_WS_CANDIDATES = [
    (16, 4, 2, 1, 2, 1, 1),
    (16, 4, 2, 1, 1, 1, 1),
    (16, 2, 4, 1, 2, 1, 1),
    (16, 2, 4, 1, 4, 1, 1),
    (32, 2, 4, 1, 1, 1, 1),
    (32, 2, 4, 1, 2, 1, 1),
]
_MMA_MAX_M = 16  # tokens that WGMMA is not used for
_MIN_WAVE = 0.84
_MIN_WAVE_OF_LARGE_TILES = 0.72
_MAX_ACCUMULATORS = {8: 32, 12: 16, 16: 8}  # of a thread, by consumer warps
_MAX_STAGES = 6
_RESERVED_BYTES = 1024  # shared memory that each CTA costs beside its own


def _candidates(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Family, and numbers in the order of ``WGMMA_WS_CANDIDATES``, of each candidate for a shape."""
    if shape.tokens > GEMM_MAX_M:
        yield from (("wgmma_ws", numbers) for numbers in WGMMA_WS_CANDIDATES if 8 * numbers[0] < 2 * shape.tokens)
        return
    for family, table in (("mma", MMA_CANDIDATES), ("wgmma", WGMMA_CANDIDATES if device.wgmma else {})):
        if table:
            token_tiles = next(count for count in sorted(table) if shape.tokens <= 8 * count)
            yield from ((family, (token_tiles, *numbers)) for numbers in table[token_tiles])


def _one_wave(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Family, and fields, of the tiles without stream-K whose CTAs fill at least 84 % of one wave."""
    family = "mma" if shape.tokens <= _MMA_MAX_M or not device.wgmma else "wgmma"
    block_m = next(count for count in (8, 16, 32, 64) if shape.tokens <= count)
    warps_m = (1, 2, 4) if family == "wgmma" else (1,)
    sizes = itertools.product(range(1, 9), warps_m, (1, 2, 4, 8), range(1, 9), range(1, 5), (1, 2, 4))
    for warps_n, m, k, cluster, ctas_per_sm, units in sizes:
        warps = warps_n * m * k
        ctas = -(-tiles(shape.rows) // warps_n) * cluster
        k_tiles = -(-tiles(shape.depth) // (units * k * cluster))
        few_registers = block_m // 8 * warps * ctas_per_sm // m > 32  # for the accumulators
        if (
            warps * ctas_per_sm > 32
            or not warps * ctas_per_sm >= 8
            or few_registers
            or (family == "wgmma" and warps_n * m % 4)
        ):
            continue
        if _MIN_WAVE <= ctas / (device.multiprocessors * ctas_per_sm) <= 1:
            panel = 1 if family == "wgmma" else min(4 if block_m == 8 else 2, 1 << k_tiles.bit_length() - 1)
            fields = {"block_m": block_m, "block_n": 64 * warps_n, "block_k": 64 * units, "warps_m": m, "warps_k": k}
            fields |= {"x_panel": panel, "ctas_per_sm": ctas_per_sm, "cluster": cluster, "whole_tiles": cluster == 1}
            yield family, fields | {"x_rows": 1 if shape.tokens == 1 else block_m}


def _full_waves(shape: GemmShape, device: DeviceLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Family, and fields, of the warp-specialized tiles that fill the device: clusters one wave, whole tiles several."""
    sizes = (4, 8) if shape.tokens <= GEMM_MAX_M else (16, 32)
    for token_tiles, warps_n, warps_m, cluster, units in itertools.product(
        sizes, (2, 3, 4, 6, 8, 12), (1, 2, 4), range(1, 9), (1, 2, 4)
    ):
        warps = warps_n * warps_m
        accumulators = 4 // warps_m * token_tiles  # of a thread, 4 registers each
        output_tiles = -(-tiles(shape.rows) // warps_n) * -(-shape.tokens // (8 * token_tiles))
        waves = -(-output_tiles * cluster // device.multiprocessors)
        share = output_tiles * cluster / (waves * device.multiprocessors)
        if accumulators > _MAX_ACCUMULATORS.get(warps, 0) or (cluster > 1 and waves > 1):
            continue
        if share >= _MIN_WAVE_OF_LARGE_TILES and 8 * token_tiles < 2 * shape.tokens:
            fields = {"block_m": 8 * token_tiles, "block_n": 64 * warps_n, "block_k": 64 * units, "warps_m": warps_m}
            fields |= {"warps_k": 1, "x_panel": 1, "ctas_per_sm": 1, "cluster": cluster, "whole_tiles": cluster == 1}
            yield "wgmma_ws", fields


def tile_configs(shape: GemmShape, device: DeviceLimits, *, candidates: bool) -> list[TileConfig]:
    """Return the chosen tile configuration, and then the candidates that fit, with as many stages as there is room for."""
    found = [choose_tile_config(shape, device)]
    tables: list[tuple[str, dict[str, Any]]] = []
    for family, numbers in _candidates(shape, device) if candidates else ():
        fields = dict(
            zip(("warps_n", "warps_m", "warps_k", "units", "x_panel", "ctas_per_sm"), numbers[1:], strict=True)
        )
        sizes = {"block_m": 8 * numbers[0], "block_n": 64 * fields.pop("warps_n"), "block_k": 64 * fields.pop("units")}
        tables.append((family, fields | sizes | {"x_rows": 1 if shape.tokens == 1 else 8 * numbers[0]}))
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
