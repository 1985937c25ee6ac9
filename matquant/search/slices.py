"""Decoded slices of a parent's layers, kept in memory up to a limit: nothing is read from disk while a search runs."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from matquant.nested import NestedWeight


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


def _moved(weight: NestedWeight, device: torch.device) -> NestedWeight:
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return dataclasses.replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device), zeros=zeros)
