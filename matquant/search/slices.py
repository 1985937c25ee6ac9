"""A parent's layers at any width, served from memory: nothing is read from disk while a search runs.

``DecodedSlices`` gives a layer a dense weight, decoded once and kept within a limit. ``PlaneSlices`` lets the nested kernels
read as many bit planes as the width has: no slice is decoded or kept, so that all widths together take the parent's size.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from matquant.inference.linear import NestedLinear
from matquant.inference.planes import NestedPlanes
from matquant.nested import NestedWeight


class Slices(Protocol):
    """Makes layers of a model work at a width."""

    dtype: torch.dtype  # of the activations

    def install(self, name: str, layer: nn.Linear, bits: int) -> None:
        """Give a layer, which may have any width by now, another one."""
        ...

    def remove(self, name: str, layer: nn.Linear, own: Tensor) -> None:
        """Give a layer its own dense weight again."""
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
        self.codes = {name: _moved(weight, device) for name, weight in codes.items()}
        self.dtype = dtype
        self.limit = limit
        self.held: OrderedDict[tuple[str, int], nn.Parameter] = OrderedDict()
        self.bytes = 0
        self.decoded = 0  # how many times a slice was decoded because it was not held

    def install(self, name: str, layer: nn.Linear, bits: int) -> None:
        layer._parameters["weight"] = self.get(name, bits)

    def remove(self, name: str, layer: nn.Linear, own: Tensor) -> None:
        layer._parameters["weight"] = own  # type: ignore[assignment]

    def get(self, layer: str, bits: int) -> nn.Parameter:
        """The dense weight [out_features, in_features] of one layer at ``bits`` bits."""
        key = (layer, bits)
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        weight = nn.Parameter(self.codes[layer].decode(bits, self.dtype), requires_grad=False)
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

    def install(self, name: str, layer: nn.Linear, bits: int) -> None:
        nested = self.layers[name]
        nested.bias = layer.bias
        layer.__dict__["forward"] = functools.partial(nested.forward, bits=bits)

    def remove(self, name: str, layer: nn.Linear, own: Tensor) -> None:
        layer.__dict__.pop("forward", None)


def _moved(weight: NestedWeight, device: torch.device) -> NestedWeight:
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return dataclasses.replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device), zeros=zeros)
