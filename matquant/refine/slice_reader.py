"""Quantized layers that read the full-precision weights, or a slice made of tensors that are trained."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import patched_forwards
from matquant.refine.scaled_linear import scaled_linear

# Output of a layer at a bit-width: of its name, its input, its trained tensor, the bit-width and the bias.
LayerFunction = Callable[[str, Tensor, Tensor, int, Tensor | None], Tensor]


class SliceReader:
    """Forwards of the quantized layers of a model, in place inside the context ``patched``.

    Args:
        blocks: model, on its device.
        weights: nested weights by layer name, on the same device.
        linear: layers of a slice; by default the trained tensors are the scales of ``weights``.

    Attributes:
        layers_of_blocks: names of the quantized layers of each block.
        other_layers: names of the quantized layers outside of blocks, such as the head.
    """

    def __init__(
        self, blocks: BlockModel, weights: Mapping[str, NestedWeight], linear: LayerFunction | None = None
    ) -> None:
        self.blocks, self.weights, self._linear = blocks, weights, linear or self._scaled_linear
        # Bit-width and trained tensors; None: full precision.
        self._read: tuple[int, Mapping[str, Tensor]] | None = None
        self._layers: dict[str, Any] = {name: blocks.model.get_submodule(name) for name in weights}
        inside = [set(block.modules()) for block in blocks.blocks]
        self.layers_of_blocks = [[n for n, layer in self._layers.items() if layer in block] for block in inside]
        self.other_layers = [n for n, layer in self._layers.items() if not any(layer in block for block in inside)]

    @contextlib.contextmanager
    def reading(self, bits: int, trained: Mapping[str, Tensor]) -> Iterator[None]:
        """Read the slice of ``bits`` bits that is made of these tensors by layer, inside the context."""
        before, self._read = self._read, (bits, trained)
        try:
            yield
        finally:
            self._read = before

    def patched(self) -> Any:
        """Context in which the layers read the slice that ``reading`` sets, and full precision outside of it."""
        forwards = [self._forward_of(name, layer) for name, layer in self._layers.items()]
        return patched_forwards(list(self._layers.values()), forwards)

    def _forward_of(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._read is None:
                return F.linear(x, layer.weight, layer.bias)
            bits, trained = self._read
            return self._linear(name, x, trained[name], bits, layer.bias)

        return forward

    def _scaled_linear(self, name: str, x: Tensor, scales: Tensor, bits: int, bias: Tensor | None) -> Tensor:
        return scaled_linear(x, scales, self.weights[name], bits, bias)
