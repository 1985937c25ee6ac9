"""Launches of the kernels for mixtures of experts; plain arithmetic, no GPU."""

import dataclasses
import struct
from collections.abc import Iterable

from matquant.errors import UserError
from matquant.formats.tile_layout import tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import WARP, TileConfig
from matquant.inference.kernel_families.moe import BLOCK_M, MOE_MAX_M, MoeFamily

MAX_EXPERTS = 1024  # on one device, and ids of the router; size of ``ExpertMask`` in the kernels
_ROUTE_CHUNK = 1024  # ids in shared memory at a time
_FAMILY = MoeFamily()


def choose_block_m(tokens: int, top_k: int, experts: int) -> int:
    """Largest number of pairs of a CTA: twice the mean of an expert, at most one pair for each token.

    An expert with more pairs takes several CTAs, whose planes come from the second-level cache after the first.

    Args:
        experts: number of experts of the router, on all devices.
    """
    wanted = min(tokens, 2 * -(-tokens * top_k // experts))
    return next((block_m for block_m in BLOCK_M if wanted <= block_m), MOE_MAX_M)


def prefers_grouped(tokens: int, top_k: int, experts: int) -> bool:
    """Return True if one launch for all experts beats a loop over experts, which has to read the routing on the host.

    True up to a mean of ``MOE_MAX_M`` pairs for an expert. From there on, each expert fills a launch of its own; a CTA of the
    fused kernel would dequantize its planes once for every ``MOE_MAX_M`` pairs. At 4 bits, 64 pairs make 256 operations
    for each byte of weights, about as many as an H100 executes in the time of loading one (990 TFLOP/s, 3.35 TB/s).
    """
    return tokens * top_k <= MOE_MAX_M * experts


def max_items(pairs: int, experts: int, block_m: int) -> int:
    """Largest number of items of at most ``block_m`` pairs of one expert that ``pairs`` pairs are cut into."""
    return pairs if pairs <= experts else experts + (pairs - experts) // block_m


def expert_mask(experts: Iterable[int]) -> bytes:
    """``ExpertMask`` of the kernels. Raises UserError for more experts than it holds."""
    words = [0] * (MAX_EXPERTS // WARP)
    for expert in experts:
        if not 0 <= expert < MAX_EXPERTS:
            raise UserError(f"The kernels support experts 0 to {MAX_EXPERTS - 1}; found {expert}.")
        words[expert // WARP] |= 1 << expert % WARP
    return struct.pack(f"={len(words)}I", *words)


def route_threads(held: int) -> int:
    """Threads of ``kernels/moe_route.cu`` for the experts on this device."""
    return max(-(-held // WARP), 1) * WARP


def route_shared_bytes(threads: int) -> int:
    """Shared memory of ``kernels/moe_route.cu``."""
    return (_ROUTE_CHUNK + 2 * threads) * 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MoeLaunch:
    """Launch of ``kernels/moe_gemm.cu``, without the number of items.

    Attributes:
        source, function: the kernel.
        defines: macros of its compilation.
        row_tiles: CTAs along the rows of an expert.
        block, shared_bytes: threads of a CTA, dynamic shared memory of a CTA.
        affine: last arguments, see ``GemmShape.affine``.
    """

    source: str
    function: str
    defines: dict[str, int]
    row_tiles: int
    block: int
    shared_bytes: int
    affine: tuple[float, float, float]


def make_moe_launch(shape: GemmShape, device: DeviceLimits, tile: TileConfig | None = None) -> MoeLaunch:
    """Launch for one matrix of each expert.

    Args:
        shape: of one expert, with the pairs of a CTA as its tokens.
        tile: tile configuration; that of ``MoeFamily.choose`` if None.
    """
    tile = _FAMILY.choose(shape, device) if tile is None else tile
    shared = _FAMILY.shared_bytes(shape, tile)
    return MoeLaunch(
        source=_FAMILY.source,
        function=_FAMILY.function,
        defines=shape.defines() | _FAMILY.defines(tile) | {"SHARED_BYTES": shared},
        row_tiles=-(-tiles(shape.rows) // tile.row_blocks),
        block=_FAMILY.threads(tile),
        shared_bytes=shared,
        affine=shape.affine(),
    )
