"""What is measured: a parent read at one width, or at a width of each layer."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from matquant.quantize.parent import Parent
from matquant.search.allocation import Allocation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model that a parent holds.

    Attributes:
        name: apart from those of the other variants of a job.
        parent: whose codes it reads.
        widths: of all layers, or of each layer by name.
        allocation: the file or search that the layers' widths come from.
    """

    name: str
    parent: Parent
    widths: int | Mapping[str, int]
    allocation: Allocation | None = None

    def bits(self, layer: str) -> int:
        return self.widths if isinstance(self.widths, int) else self.widths[layer]

    def weights(self, index: int) -> dict[str, Tensor]:
        """The dense weights of the quantized layers of a block (the head counts as one more), by full name."""
        if index >= len(self.parent.blocks):
            return {}
        return {name: weight.decode(self.bits(name)) for name, weight in self.parent.block(index).items()}

    def bytes_read(self) -> int:
        """Bytes that a runtime reads for all quantized layers."""
        blocks = range(len(self.parent.blocks))
        return sum(w.bytes_read(self.bits(name)) for i in blocks for name, w in self.parent.block(i).items())

    def average_bits(self) -> float:
        """By parameters."""
        rows = self.parent.layer_errors()
        total = sum(row["parameters"] for row in rows)
        return sum(row["parameters"] * self.bits(row["name"]) for row in rows) / total
