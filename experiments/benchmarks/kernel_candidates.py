"""Tile configurations that ``bench_kernels.py --candidates`` times beside the chosen one."""

from collections.abc import Iterator

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
# (warps_n, warps_k, units, x_panel, ctas_per_sm, cluster) of clusters that share a tile, for up to 16 tokens.
CLUSTER_CANDIDATES = [
    (warps_n, warps_k, units, x_panel, ctas_per_sm, cluster)
    for warps_n, warps_k, ctas_per_sm in ((1, 4, 4), (1, 4, 6), (1, 8, 2), (1, 8, 3), (1, 16, 1), (2, 4, 2), (2, 4, 3))
    for units, x_panel in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
    for cluster in (2, 4, 8)
]
_CLUSTER_MAX_M = 16
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
    if device.clusters and shape.tokens <= _CLUSTER_MAX_M:
        for warps_n, warps_k, units, x_panel, ctas_per_sm, cluster in CLUSTER_CANDIDATES:
            if warps_k * units * cluster <= tiles(shape.depth):
                yield "mma", (-(-shape.tokens // 8), warps_n, 1, warps_k, units, x_panel, ctas_per_sm, cluster)


def tile_configs(shape: GemmShape, device: DeviceLimits, *, candidates: bool) -> list[TileConfig]:
    """Return the chosen tile configuration, and then the candidates that fit, with as many stages as there is room for."""
    found = [choose_tile_config(shape, device)]
    for family, numbers in _candidates(shape, device) if candidates else ():
        token_tiles, warps_n, warps_m, warps_k, units, x_panel, ctas_per_sm, cluster = (*numbers, 1)[:8]
        for stages in range(_MAX_STAGES, 1, -1):
            tile = TileConfig(
                family=family,
                block_m=8 * token_tiles,
                block_n=64 * warps_n,
                block_k=64 * units,
                warps_m=warps_m,
                warps_k=warps_k,
                stages=stages,
                x_panel=x_panel,
                ctas_per_sm=ctas_per_sm,
                cluster=cluster,
                whole_tiles=cluster == 0,
                x_rows=1 if shape.tokens == 1 and family == "mma" else 8 * token_tiles,
            )
            needed = FAMILIES[family].shared_bytes(shape, tile) + _RESERVED_BYTES
            if ctas_per_sm * needed <= device.shared_bytes:
                found.append(tile)
                break
    return list(dict.fromkeys(found))
