"""Quantized layers that read the full-precision weights, or a slice with scales that are given."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import patched_forwards
from matquant.refine.scaled_linear import scaled_linear


class SliceReader:
    """Forwards of the quantized layers of a model, in place inside the context ``patched``.

    Args:
        blocks: model, on its device.
        weights: nested weights by layer name, on the same device.

    Attributes:
        layers_of_blocks: names of the quantized layers of each block.
        other_layers: names of the quantized layers outside of blocks, such as the head.
    """

    def __init__(self, blocks: BlockModel, weights: Mapping[str, NestedWeight]) -> None:
        self.blocks, self.weights = blocks, weights
        self._read: tuple[int, Mapping[str, Tensor]] | None = None  # bit-width and scales; None: full precision
        self._layers: dict[str, Any] = {name: blocks.model.get_submodule(name) for name in weights}
        inside = [set(block.modules()) for block in blocks.blocks]
        self.layers_of_blocks = [[n for n, layer in self._layers.items() if layer in block] for block in inside]
        self.other_layers = [n for n, layer in self._layers.items() if not any(layer in block for block in inside)]

    @contextlib.contextmanager
    def reading(self, bits: int, scales: Mapping[str, Tensor]) -> Iterator[None]:
        """Read the slice of ``bits`` bits with these scales, float32 [out_features, groups] by layer, inside the context."""
        before, self._read = self._read, (bits, scales)
        try:
            yield
        finally:
            self._read = before

    def patched(self) -> Any:
        """Context in which the layers of the model read what ``reading`` says, and full precision outside of it."""
        forwards = [self._forward_of(name, layer) for name, layer in self._layers.items()]
        return patched_forwards(list(self._layers.values()), forwards)

    def _forward_of(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = self.weights[name]

        def forward(x: Tensor) -> Tensor:
            if self._read is None:
                return F.linear(x, layer.weight, layer.bias)
            bits, scales = self._read
            return scaled_linear(x, scales[name], weight, bits, layer.bias)

        return forward
