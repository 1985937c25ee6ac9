"""Variants of ``kernels/gemm.cu`` that ``bench_kernels.py --candidates`` tries beside the chosen one."""

from matquant.inference.plan import TOKENS
from matquant.inference.problem import Device, Problem
from matquant.inference.variants import Variant, choose

# (row_warps, tile_warps, k_warps, units, panel, blocks) by tiles of 8 tokens; as many stages as there is room for.
CANDIDATES = {
    1: [
        (8, 1, 1, 2, 4, 3), (8, 1, 1, 1, 4, 3), (8, 1, 1, 2, 8, 2), (8, 1, 1, 4, 4, 2), (16, 1, 1, 2, 8, 1),
        (16, 1, 1, 4, 4, 1),
        (4, 1, 2, 2, 2, 3), (4, 1, 2, 2, 4, 2), (4, 1, 2, 1, 4, 2), (8, 1, 2, 2, 4, 1), (2, 1, 4, 2, 1, 3), (2, 1, 4, 1, 2, 2),
        (1, 1, 8, 2, 1, 2), (1, 1, 8, 2, 1, 3), (1, 1, 8, 1, 2, 2), (1, 1, 4, 1, 2, 4), (2, 1, 2, 1, 2, 4), (2, 1, 8, 1, 2, 1),
    ],
    2: [
        (8, 1, 1, 2, 4, 1), (8, 1, 1, 4, 2, 1), (8, 1, 1, 2, 4, 2), (8, 1, 1, 4, 2, 2), (4, 1, 2, 2, 2, 2), (4, 1, 2, 2, 4, 1),
        (2, 1, 4, 4, 1, 1), (2, 1, 4, 2, 1, 1), (2, 1, 4, 2, 1, 2), (2, 1, 4, 1, 1, 1), (1, 1, 8, 1, 1, 2),
    ],
    4: [
        (8, 1, 1, 2, 2, 1), (4, 1, 2, 2, 1, 1), (4, 1, 2, 1, 2, 1), (2, 1, 4, 2, 1, 1), (2, 1, 4, 1, 1, 1), (4, 2, 2, 2, 1, 1),
        (4, 1, 1, 2, 2, 2), (8, 2, 1, 2, 2, 1),
    ],
    8: [(4, 2, 1, 2, 1, 1), (4, 2, 1, 1, 2, 1), (2, 2, 2, 2, 1, 1), (2, 4, 2, 2, 1, 1), (4, 4, 1, 2, 1, 1)],
}  # fmt: skip
WGMMA_CANDIDATES = {
    2: [(2, 2, 4, 2, 1, 1), (4, 1, 4, 2, 1, 1), (8, 1, 1, 4, 1, 1), (4, 1, 1, 4, 1, 2), (4, 1, 2, 2, 2, 1)],
    4: [
        (2, 2, 4, 2, 1, 1), (4, 1, 2, 2, 1, 1), (1, 4, 4, 2, 1, 1), (8, 1, 1, 4, 1, 1), (8, 1, 1, 2, 2, 1), (4, 1, 1, 4, 1, 2),
        (4, 1, 4, 2, 1, 1), (4, 2, 1, 4, 1, 2), (4, 2, 2, 2, 1, 1),
    ],
    8: [
        (1, 4, 4, 2, 1, 1), (2, 4, 2, 2, 1, 1), (2, 2, 2, 2, 1, 1), (8, 1, 1, 4, 1, 1), (8, 1, 1, 2, 2, 1), (4, 1, 1, 4, 1, 2),
        (4, 2, 1, 4, 1, 1), (4, 2, 2, 2, 1, 1), (2, 2, 4, 2, 1, 1), (4, 1, 2, 2, 1, 1), (2, 2, 1, 4, 1, 2),
    ],
    16: [
        (1, 4, 2, 2, 1, 1), (4, 2, 1, 4, 1, 1), (4, 2, 1, 2, 1, 1), (2, 4, 1, 4, 1, 1), (2, 4, 1, 2, 1, 1), (4, 4, 1, 4, 1, 1),
        (2, 4, 2, 2, 1, 1), (2, 2, 2, 2, 1, 1), (2, 2, 1, 2, 1, 2), (1, 4, 2, 4, 1, 1),
    ],
}  # fmt: skip


def variants(problem: Problem, device: Device, *, candidates: bool) -> list[Variant]:
    """The chosen variant, and then the others that fit."""
    found = [choose(problem, device)]
    for wgmma, shapes in ((False, CANDIDATES), (True, WGMMA_CANDIDATES)) if candidates else ():
        if (wgmma and not device.wgmma) or (not wgmma and problem.tokens > TOKENS):
            continue
        tiles = next((count for count in sorted(shapes) if problem.tokens <= 8 * count), 16)
        for row_warps, tile_warps, k_warps, units, panel, blocks in shapes[tiles]:
            for stages in (6, 5, 4, 3, 2):
                variant = Variant(
                    token_tiles=tiles, row_warps=row_warps, tile_warps=tile_warps, k_warps=k_warps,
                    units=units, stages=stages, panel=panel, blocks=blocks, wgmma=wgmma,
                )  # fmt: skip
                if blocks * (variant.shared_bytes(problem) + 1024) <= device.shared_bytes:
                    found.append(variant)
                    break
    return list(dict.fromkeys(found))
