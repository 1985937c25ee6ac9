"""Base of the kernel families: tile configurations, and the choice among them for a shape and a device."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from matquant.cuda.tma import TmaDescriptor
from matquant.formats.tile_layout import TILE, tiles
from matquant.inference.gemm_shape import DeviceLimits, GemmShape

LOAD_BYTES = 16  # bytes of one load of a thread
WARP = 32
TOKEN_TILE = 8  # tokens of one MMA tile
_MAX_STAGES = 6
_RESERVED_BYTES = 1024  # shared memory that each CTA costs beside its own, from sm_80 on

# TMA descriptors of planes, scales, zero points and x; None for an array that is loaded without TMA.
TmaDescriptors = tuple[TmaDescriptor | None, TmaDescriptor | None, TmaDescriptor | None, TmaDescriptor | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileCandidate:
    """Tile configuration before the number of pipeline stages is known; the other fields are those of ``TileConfig``.

    Attributes:
        min_stages: fewest pipeline stages for which the configuration pays.
        max_planes, max_k_tiles, min_k_tiles: bit planes, and k-tiles of a CTA, for which it pays; 0 for no limit.
    """

    block_n: int
    block_k: int
    block_m: int = 0
    row_block_warps: int = 1
    warps_k: int = 1
    x_stage_tiles: int = 1
    ctas_per_sm: int = 1
    min_stages: int = 2
    cluster: int = 1
    whole_tiles: bool = False
    x_rows: int = 0
    max_planes: int = 0
    max_k_tiles: int = 0
    min_k_tiles: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Tile configuration of a kernel family.

    Attributes:
        family: name of the kernel family.
        block_m: tokens of a CTA tile, a multiple of 8.
        block_n: rows of W of a CTA tile, a multiple of 64; a warp (or a warpgroup's quarter) has 64.
        block_k: columns of a k-tile per K warp, a multiple of 64.
        row_block_warps: warps that share 64 rows of W: 1, 2 or 4.
        warps_k: warps along K.
        stages: pipeline stages of weights in shared memory.
        x_stage_tiles: k-tiles of activations in one pipeline stage of x.
        ctas_per_sm: CTAs that are resident on a multiprocessor.
        cluster: CTAs that share a tile and reduce it through distributed shared memory; 1 for stream-K.
        whole_tiles: a CTA computes a whole tile: there are as many CTAs as tiles.
        x_rows: tokens of activations in shared memory: 1, or block_m.
    """

    family: str
    block_m: int
    block_n: int
    block_k: int
    row_block_warps: int
    warps_k: int
    stages: int
    x_stage_tiles: int
    ctas_per_sm: int
    cluster: int = 1
    whole_tiles: bool = False
    x_rows: int = 0

    def __post_init__(self) -> None:
        if not self.x_rows:
            object.__setattr__(self, "x_rows", self.block_m)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 rows in a CTA tile."""
        return self.block_n // TILE

    @property
    def mma_warps(self) -> int:
        """Number of consumer (MMA) warps."""
        return self.row_blocks * self.row_block_warps * self.warps_k

    @property
    def token_tiles(self) -> int:
        """Tiles of 8 tokens."""
        return self.block_m // TOKEN_TILE

    @property
    def k_units(self) -> int:
        """Units of 64 columns in a k-tile."""
        return self.block_k // TILE


class KernelFamily(abc.ABC):
    """Kernels of one source that differ by their tile configuration.

    Attributes:
        name: unique among the families.
        source, function: file in ``kernels/`` and its entry point.
        wgmma: True if the products are WGMMA instructions.
        persistent: True if a CTA works on one tile after the other, and stream-K splits the remaining tiles alone.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    function: ClassVar[str]
    wgmma: ClassVar[bool]
    persistent: ClassVar[bool] = False

    @abc.abstractmethod
    def supports(self, shape: GemmShape, device: DeviceLimits) -> bool:
        """Return True if the family is the choice for a shape on a device, unless an earlier family is."""

    @abc.abstractmethod
    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        """Candidates for a shape, the best first, with ``block_m`` set."""

    @abc.abstractmethod
    def spills(self, shape: GemmShape, tile: TileCandidate) -> bool:
        """Return True if accumulators and operands of a candidate need more registers than there are."""

    @abc.abstractmethod
    def shared_bytes(self, shape: GemmShape, tile: TileConfig) -> int:
        """Size of the struct ``Shared`` in the kernel."""

    @abc.abstractmethod
    def tma_descriptors(self, shape: GemmShape, tile: TileConfig) -> TmaDescriptors | None:
        """TMA descriptors of the arrays; None if the kernel uses none."""

    def threads(self, tile: TileConfig) -> int:
        """Threads of a CTA."""
        return WARP * tile.mma_warps

    def defines(self, tile: TileConfig) -> dict[str, int]:
        """Macros of the tile configuration."""
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "ROW_BLOCK_WARPS": tile.row_block_warps,
            "WARPS_K": tile.warps_k,
            "STAGES": tile.stages,
            "X_STAGE_TILES": tile.x_stage_tiles,
            "BLOCKS_PER_SM": tile.ctas_per_sm,
            "WGMMA": int(self.wgmma),
            "CLUSTER": tile.cluster,
            "X_ROWS": tile.x_rows,
        }

    def choose(self, shape: GemmShape, device: DeviceLimits) -> TileConfig:
        """Return the first candidate that fits the device's shared memory, with as many stages as there is room for.

        Raises:
            ValueError: no candidate fits.
        """
        config = self.find(shape, device)
        if config is None:
            raise ValueError(f"no tile configuration of {self.name} fits {device.shared_bytes} bytes of shared memory")
        return config

    def find(self, shape: GemmShape, device: DeviceLimits) -> TileConfig | None:
        """Return the result of ``choose``, or None if no candidate fits."""
        for tile in self.candidates(shape, device):
            if self.spills(shape, tile) or _divides_a_group(shape, tile):
                continue
            for stages in range(_most_stages(shape, tile), tile.min_stages - 1, -1):
                config = self._with_stages(tile, stages)
                needed = tile.ctas_per_sm * (self.shared_bytes(shape, config) + _RESERVED_BYTES)
                if needed <= device.shared_bytes:
                    return config
        return None

    def _with_stages(self, tile: TileCandidate, stages: int) -> TileConfig:
        fields = dataclasses.asdict(tile)
        for limit in ("min_stages", "max_planes", "max_k_tiles", "min_k_tiles"):
            del fields[limit]
        return TileConfig(family=self.name, stages=stages, **fields)


def weight_stage_bytes(shape: GemmShape, tile: TileConfig) -> int:
    """Bytes of one stage of weights of one warp: planes, scales and zero points."""
    columns = tile.block_k
    groups = columns // (shape.group if 0 < shape.group < columns else columns)
    side = 3 if shape.format.has_zero_points else 2
    return tile.k_units * shape.planes * WARP * LOAD_BYTES + groups * TILE * side


def registers_per_thread(tile: TileCandidate) -> int:
    """Registers that a thread can have, so that all CTAs of a multiprocessor are resident."""
    warps = tile.block_n // TILE * tile.row_block_warps * tile.warps_k * tile.ctas_per_sm
    return min(65536 // (WARP * warps), 255)


def needs_few_registers(shape: GemmShape) -> bool:
    """Return True for float16, groups of 128 or more, no zero points and ``msb`` slices, which need the fewest registers."""
    plain = shape.dtype == torch.float16 and not shape.format.has_zero_points and shape.planes == shape.bits
    return plain and (shape.group == 0 or shape.group >= 2 * TILE)


def k_tiles_per_cta(shape: GemmShape, tile: TileCandidate) -> int:
    """K-tiles of a CTA of a cluster, or of one that computes a whole tile."""
    return -(-tiles(shape.depth) * TILE // (tile.block_k * tile.warps_k * tile.cluster))


def _most_stages(shape: GemmShape, tile: TileCandidate) -> int:
    """Pipeline stages that are of use: one more than a CTA has k-tiles. What is left is for the next kernel's CTAs."""
    if tile.cluster == 1 and not tile.whole_tiles:
        return _MAX_STAGES
    return min(_MAX_STAGES, max(k_tiles_per_cta(shape, tile) + 1, tile.min_stages))


def _divides_a_group(shape: GemmShape, tile: TileCandidate) -> bool:
    """Return True if a k-tile would hold a part of a group and more."""
    return bool(shape.group and shape.group % tile.block_k and tile.block_k % shape.group)
