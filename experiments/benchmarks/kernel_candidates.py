"""Variants of ``kernels/gemm.cu`` that ``bench_kernels.py --candidates`` tries beside the chosen one."""

from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families import TOKENS, Variant, choose_tile_config

# (row_warps, tile_warps, k_warps, units, panel, blocks) by tiles of 8 tokens; as many stages as there is room for.
CANDIDATES = {
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
# With tiles of 8 tokens in front: for more than ``TOKENS``.
MANY_CANDIDATES = [
    (16, 4, 2, 1, 2, 1, 1),
    (16, 4, 2, 1, 1, 1, 1),
    (16, 2, 4, 1, 2, 1, 1),
    (16, 2, 4, 1, 4, 1, 1),
    (32, 2, 4, 1, 1, 1, 1),
    (32, 2, 4, 1, 2, 1, 1),
]
_MOST_STAGES = 6


def _shapes(problem: GemmShape, device: DeviceLimits) -> list[tuple[bool, tuple[int, ...]]]:
    """Whether by wgmma, and a shape with tiles of 8 tokens in front."""
    if problem.tokens > TOKENS:
        return [(True, shape) for shape in MANY_CANDIDATES if 8 * shape[0] < 2 * problem.tokens]
    found = []
    for wgmma, shapes in ((False, CANDIDATES), (True, WGMMA_CANDIDATES if device.wgmma else {})):
        if shapes:
            tiles = next(count for count in sorted(shapes) if problem.tokens <= 8 * count)
            found += [(wgmma, (tiles, *shape)) for shape in shapes[tiles]]
    return found


def variants(problem: GemmShape, device: DeviceLimits, *, candidates: bool) -> list[Variant]:
    """The chosen variant, and then the others that fit."""
    found = [choose_tile_config(problem, device)]
    for wgmma, shape in _shapes(problem, device) if candidates else ():
        token_tiles, row_warps, tile_warps, k_warps, units, panel, blocks = shape
        for stages in range(_MOST_STAGES, 1, -1):
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
                many=problem.tokens > TOKENS,
            )
            if blocks * (variant.shared_bytes(problem) + 1024) <= device.shared_bytes:
                found.append(variant)
                break
    return list(dict.fromkeys(found))
