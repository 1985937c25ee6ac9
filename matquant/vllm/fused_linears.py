"""Stored layers that vLLM fuses, such as q, k and v, in one launch: their tensors are ranges of row tiles of shared ones.

A step in which all members read the same bit-width multiplies with all of them at once; otherwise neighbours of equal
bit-width share a launch.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from matquant.formats.tile_layout import TILE
from matquant.inference.linear import scale_buffers
from matquant.inference.row_ranges import empty_whole, tile_ranges
from matquant.vllm.plane_memory import PlaneMemory
from matquant.vllm.sharded_linear import ShardedLinear, ShardedNestedLinear, multiply


class FusedLinears(nn.Module):
    """Members with the same input, format and planes, before they are loaded. Make it by ``fuse``.

    Args:
        members: in the order of the output. Their tensors become ranges of new ones; readers of the members of another
            ``FusedLinears`` read its tensors.

    Attributes:
        planes, scales, scales2, ..., zeros: as in ``ShardedNestedLinear``, for the rows of all members.
    """

    planes: Tensor
    zeros: Tensor | None

    def __init__(self, members: Sequence[ShardedNestedLinear]) -> None:
        super().__init__()
        self.rows = [member.shard.shape[0] for member in members]
        self.columns = members[0].shard.shape[1]
        self.format, self.scale_bits = members[0].format, members[0].scale_bits
        self._step_bits = [member.step_bits for member in members]
        names = ["planes", *scale_buffers(self.format, len(members[0].planes))]
        names += ["zeros"] if members[0].zeros is not None else []
        self.register_buffer("zeros", None, persistent=False)
        shared = members[0].fused if members[0].is_reader else None
        for name in names:
            parts = [getattr(member, name) for member in members]
            whole = empty_whole(parts) if shared is None else getattr(shared, name)
            self.register_buffer(name, whole, persistent=False)
        if shared is None:
            memory = PlaneMemory(self.planes)
            for member, ranges in zip(members, tile_ranges(self.rows), strict=True):
                for name in names:
                    setattr(member, name, getattr(self, name)[:, ranges])
                member.share(self, memory)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map [..., columns] to [..., rows of all members] at the bit-widths of the current step."""
        return multiply(self, x, bias, self._step_bits, self.rows, self.columns)


def fuse(linears: Sequence[ShardedLinear]) -> FusedLinears | None:
    """Fuse layers that share an input, before they are loaded.

    Returns:
        None if they stay separate: dense layers, several formats, or one that ends within a tile and is not the last.
    """
    members = [linear for linear in linears if isinstance(linear, ShardedNestedLinear)]
    if len(members) < max(len(linears), 2) or any(member.shard.shape[0] % TILE for member in members[:-1]):
        return None
    first = members[0]
    same = (first.format, first.shard.shape[1], len(first.planes), first.is_reader)
    if any((one.format, one.shard.shape[1], len(one.planes), one.is_reader) != same for one in members):
        return None
    if first.is_reader and any(one.fused is None or one.fused is not first.fused for one in members):
        return None
    return FusedLinears(members)
