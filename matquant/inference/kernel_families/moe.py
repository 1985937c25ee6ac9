"""Kernel family of ``kernels/moe_gemm.cu``: the experts of a mixture, for few tokens each. No choice for a single matrix.

A CTA multiplies with all columns, so that K warps take the place of split-K; the experts of a step are many tiles.
"""

import dataclasses
from collections.abc import Sequence

from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import TileCandidate, TileConfig
from matquant.inference.kernel_families.mma import MmaFamily

MOE_MAX_M = 64  # pairs of one expert in a CTA
_ROW_LISTS_BYTES = 8  # shared memory for the rows of x and of y of a pair

# Candidates by block_m, the best first. Derived from those of single matrices; not measured for experts.
_CANDIDATES = {
    8: (
        TileCandidate(block_n=64, block_k=128, warps_k=8, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64, warps_k=8, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64, warps_k=4, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64, warps_k=2, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64),
    ),
    16: (
        TileCandidate(block_n=128, block_k=128, warps_k=4),
        TileCandidate(block_n=128, block_k=64, warps_k=4),
        TileCandidate(block_n=64, block_k=64, warps_k=4, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64, warps_k=2, ctas_per_sm=2),
        TileCandidate(block_n=64, block_k=64),
    ),
    32: (
        TileCandidate(block_n=128, block_k=128, warps_k=4),
        TileCandidate(block_n=256, block_k=64, warps_k=2, x_stage_tiles=2),
        TileCandidate(block_n=128, block_k=64),
        TileCandidate(block_n=64, block_k=64, row_block_warps=2),
    ),
    64: (
        TileCandidate(block_n=256, block_k=128, row_block_warps=2),
        TileCandidate(block_n=256, block_k=64, row_block_warps=2, x_stage_tiles=2),
        TileCandidate(block_n=128, block_k=64, row_block_warps=4),
        TileCandidate(block_n=64, block_k=64, row_block_warps=2),
    ),
}
BLOCK_M = tuple(_CANDIDATES)


class MoeFamily(MmaFamily):
    """The mainloop of ``gemm.cu`` for a stack of experts; ``tokens`` of a shape are the pairs of a CTA at most."""

    name = "moe"
    source, function = "moe_gemm.cu", "nested_moe_gemm"

    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        return shape.tokens <= MOE_MAX_M

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        """Candidates with at least two k-tiles along K; the last one has the smallest k-tile, for any K."""
        block_m = next(m for m in BLOCK_M if shape.tokens <= m)
        *larger, last = _CANDIDATES[block_m]
        fitting = [tile for tile in larger if 2 * tile.block_k * tile.warps_k <= shape.depth]
        return [dataclasses.replace(tile, block_m=block_m) for tile in (*fitting, last)]

    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        return super().shared_bytes(shape, tile) + _ROW_LISTS_BYTES * tile.block_m

    def defines(self, tile: TileConfig) -> dict[str, int]:
        return super().defines(tile) | {"GATHER": 1}
