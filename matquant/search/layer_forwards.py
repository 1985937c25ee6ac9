"""A parent's layers at any width, served from memory: nothing is read from disk while a search runs.

``DecodedSlices`` gives a layer a dense weight, decoded once and kept within a limit. ``PlaneSlices`` lets the nested kernels
read as many bit planes as the width has: no slice is decoded or kept, so that all widths together take the parent's size.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from matquant.formats.bits import BIT_WIDTHS
from matquant.formats.nested import NestedWeight
from matquant.formats.planes import NestedPlanes
from matquant.inference.linear import NestedLinear


class Slices(Protocol):
    """Serves layers of a model at any width."""

    dtype: torch.dtype  # of the activations

    @property
    def mixes(self) -> bool:
        """Whether several widths of every layer at the same time take no more memory than one after the other."""
        ...

    def serve(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        """What stands for the layer's forward at ``bits`` bits; what it needs is in memory for as long as it is."""
        ...


class DecodedSlices:
    """Layers at the widths that were asked for, the ones not used for longest dropped first.

    Args:
        codes: the nested weights by layer name; they stay in memory, on ``device``.
        device: of the slices.
        dtype: of the slices.
        limit: bytes that the slices may take together. One slice is held whatever the limit.
    """

    def __init__(self, codes: Mapping[str, NestedWeight], device: torch.device, dtype: torch.dtype, limit: int) -> None:
        self.codes = {name: weight.to(device) for name, weight in codes.items()}
        self.dtype = dtype
        self.limit = limit
        self.held: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self.bytes = 0
        self.decoded = 0  # how many times a slice was decoded because it was not held

    @property
    def mixes(self) -> bool:
        """Whether all slices fit in the limit."""
        weights = sum(weight.codes.numel() for weight in self.codes.values())
        return weights * self.dtype.itemsize * len(BIT_WIDTHS) <= self.limit

    def serve(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        return functools.partial(linear, weight=self.get(name, bits), bias=layer.bias)

    def get(self, layer: str, bits: int) -> Tensor:
        """The dense weight [out_features, in_features] of one layer at ``bits`` bits."""
        key = (layer, bits)
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        weight = self.codes[layer].dequantize(bits, self.dtype)
        self.decoded += 1
        self.held[key] = weight
        self.bytes += weight.nbytes
        while self.bytes > self.limit and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1].nbytes
        return weight


class PlaneSlices:
    """Layers whose forward is that of a nested layer.

    Args:
        codes: the nested weights by layer name.
        device: of the planes. On a GPU the kernels need float16 or bfloat16, and CuPy.
        dtype: of the activations.
    """

    def __init__(self, codes: Mapping[str, NestedWeight], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers = {
            name: NestedLinear.from_planes(NestedPlanes.pack(weight).to(device)) for name, weight in codes.items()
        }

    @property
    def mixes(self) -> bool:
        """Always: a width is no more than how many planes are read."""
        return True

    def serve(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        nested = self.layers[name]
        nested.bias = layer.bias
        return functools.partial(nested.forward, bits=bits)
