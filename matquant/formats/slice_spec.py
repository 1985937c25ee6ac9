"""Slice of a parent: the parent read at one bit-width, or at a bit-width per layer."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from matquant.formats.allocation import Allocation
from matquant.formats.parent import Parent


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SliceSpec:
    """One model that a parent holds.

    Attributes:
        name: unique within the job.
        parent: source of the codes.
        bits: bit-width of all layers, or of each layer by name.
        allocation: file or search that the layers' bit-widths come from; None for a uniform slice.
    """

    name: str
    parent: Parent
    bits: int | Mapping[str, int]
    allocation: Allocation | None = None

    def bits_of(self, layer: str) -> int:
        """Bit-width of one layer."""
        return self.bits if isinstance(self.bits, int) else self.bits[layer]

    def weights(self, index: int) -> dict[str, Tensor]:
        """Dense float32 weights of the quantized layers of a block by full name; the head is the block after the last."""
        if index >= len(self.parent.blocks):
            return {}
        return {name: weight.dequantize(self.bits_of(name)) for name, weight in self.parent.block(index).items()}

    def bytes_read(self) -> int:
        """Bytes that a runtime reads for all quantized layers."""
        blocks = range(len(self.parent.blocks))
        return sum(w.bytes_read(self.bits_of(name)) for i in blocks for name, w in self.parent.block(i).items())

    def average_bits(self) -> float:
        """Mean bit-width, weighted by parameters."""
        rows = self.parent.layer_errors()
        total: int = sum(row["parameters"] for row in rows)
        bits: float = sum(row["parameters"] * self.bits_of(row["name"]) for row in rows)
        return bits / total
