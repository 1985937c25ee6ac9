"""Nested layers of the experts of one block as one stack: their tensors become ranges of row tiles of shared ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matquant.formats.tile_layout import TILE
from matquant.inference.expert_ops import StackedExperts
from matquant.inference.linear import NestedLinear, scale_buffers


class LayerStack:
    """Stack of one layer of each expert, made when it is first needed and again when tensors were replaced.

    A layer keeps its buffers and can be called, moved, saved and copied; a copy has tensors of its own.
    """

    def __init__(self) -> None:
        self._stacked: StackedExperts | None = None
        self._tensors: list[Tensor | None] = []

    def of(self, layers: Sequence[NestedLinear]) -> StackedExperts | None:
        """Stack of these layers; None if they differ in format, size, planes or device, or have rows beside whole tiles.

        New tensors are allocated for all layers together, and the old ones freed.
        """
        if self._stacked is None or not self._is_current(layers):
            self._stacked = _stack(layers) if _are_alike(layers) else None
            self._tensors = _buffers(layers)
        return self._stacked

    def is_ready(self, layers: Sequence[NestedLinear]) -> bool:
        """True if ``of`` would allocate nothing."""
        return self._stacked is not None and self._is_current(layers)

    def _is_current(self, layers: Sequence[NestedLinear]) -> bool:
        found = _buffers(layers)
        return len(found) == len(self._tensors) and all(a is b for a, b in zip(found, self._tensors, strict=True))


def _buffers(layers: Sequence[NestedLinear]) -> list[Tensor | None]:
    return [tensor for layer in layers for tensor in layer._buffers.values()]


def _are_alike(layers: Sequence[NestedLinear]) -> bool:
    """True if the tensors of the layers can be ranges of shared ones."""
    kinds = {(one.format, one.out_features, one.in_features, one.planes.shape[0], one.planes.device) for one in layers}
    return len(kinds) == 1 and layers[0].out_features % TILE == 0


def _stack(layers: Sequence[NestedLinear]) -> StackedExperts:
    """Move the tensors of the layers into shared ones."""
    first = layers[0]
    names = ["planes", *scale_buffers(first.format, first.planes.shape[0])]
    names += [] if first.zeros is None else ["zeros"]
    whole = {}
    with torch.inference_mode(False), torch.no_grad():  # tensors that inference mode makes are of no use outside of it
        for name in names:
            whole[name] = torch.cat([getattr(layer, name) for layer in layers], 1)
            for layer, part in zip(layers, whole[name].chunk(len(layers), 1), strict=True):
                setattr(layer, name, part)
    scale_bits = first.format.scale_bits_within(first.planes.shape[0])
    return StackedExperts(
        planes=whole["planes"],
        scales=[whole[name] for name in scale_buffers(first.format, first.planes.shape[0])],
        scale_bits=scale_bits,
        zeros=whole.get("zeros"),
        out_features=[first.out_features],
        in_features=first.in_features,
        format=first.format,
    )
