"""Forward functions of a parent's layers at any bit-width, from memory: a search reads no weights from disk.

``DenseLayerForwards`` multiplies by dequantized weights and caches them. ``PlaneLayerForwards`` runs the nested kernels
on the parent's bit planes: nothing is dequantized or cached, and all bit-widths together take the memory of the parent.
"""

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from matquant.formats.bits import BIT_WIDTHS
from matquant.formats.nested import NestedWeight
from matquant.formats.planes import NestedPlanes
from matquant.inference.linear import NestedLinear


class LayerForwards(Protocol):
    """Forward functions of the layers of a model at any bit-width.

    Attributes:
        name: value of ``search.layer_forward``.
        dtype: dtype of the activations.
    """

    name: ClassVar[str]
    dtype: torch.dtype

    @property
    def supports_mixed_bits(self) -> bool:
        """True if a layer can run at several bit-widths in one forward pass without more memory."""
        ...

    def forward_for(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        """Forward function of a layer at ``bits`` bits. It holds a reference to its weights."""
        ...


class DenseWeightCache:
    """Dequantized weights by layer and bit-width; the least recently used ones are dropped first.

    Args:
        weights: nested weights by layer name, on the device of the dense weights.
        dtype: dtype of the dense weights.
        max_bytes: upper bound on the size of the cache. One weight is kept even if it is larger.

    Attributes:
        nbytes: size of the cached weights.
        misses: number of dequantizations.
    """

    def __init__(self, weights: Mapping[str, NestedWeight], dtype: torch.dtype, max_bytes: int) -> None:
        self.weights = weights
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.misses = 0
        self._cached: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    @property
    def holds_all(self) -> bool:
        """True if the weights of all layers at all bit-widths fit into ``max_bytes``."""
        elements = sum(weight.codes.numel() for weight in self.weights.values())
        return elements * self.dtype.itemsize * len(BIT_WIDTHS) <= self.max_bytes

    def get(self, layer: str, bits: int) -> Tensor:
        """Return the dense weight [out_features, in_features] of one layer at ``bits`` bits."""
        key = (layer, bits)
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        weight = self.weights[layer].dequantize(bits, self.dtype)
        self.misses += 1
        self._cached[key] = weight
        self.nbytes += weight.nbytes
        while self.nbytes > self.max_bytes and len(self._cached) > 1:
            self.nbytes -= self._cached.popitem(last=False)[1].nbytes
        return weight


class DenseLayerForwards:
    """Layers with dense weights, dequantized on first use.

    Args:
        weights: nested weights by layer name; copied to ``device``.
        device: device of the dense weights.
        dtype: dtype of the dense weights and the activations.
        cache_bytes: upper bound on the size of the dense weights that are kept.
    """

    name: ClassVar[str] = "dense"

    def __init__(
        self, weights: Mapping[str, NestedWeight], device: torch.device, dtype: torch.dtype, cache_bytes: int
    ) -> None:
        self.dtype = dtype
        self.cache = DenseWeightCache({name: weight.to(device) for name, weight in weights.items()}, dtype, cache_bytes)

    @property
    def supports_mixed_bits(self) -> bool:
        """True if the cache holds all layers at all bit-widths."""
        return self.cache.holds_all

    def forward_for(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        """Dense matrix product with the dequantized weight."""
        return functools.partial(linear, weight=self.cache.get(name, bits), bias=layer.bias)


class PlaneLayerForwards:
    """Layers that run the nested kernels.

    Args:
        weights: nested weights by layer name.
        device: device of the planes. On a GPU the kernels need CuPy and activations in float16 or bfloat16.
        dtype: dtype of the activations.
    """

    name: ClassVar[str] = "planes"

    def __init__(self, weights: Mapping[str, NestedWeight], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers = {
            name: NestedLinear.from_planes(NestedPlanes.pack(weight).to(device)) for name, weight in weights.items()
        }

    @property
    def supports_mixed_bits(self) -> bool:
        """True: a bit-width is only the number of planes that the kernel reads."""
        return True

    def forward_for(self, name: str, layer: nn.Linear, bits: int) -> Callable[[Tensor], Tensor]:
        """Forward function of the nested layer, with the bias of ``layer``."""
        nested = self.layers[name]
        nested.bias = layer.bias
        return functools.partial(nested.forward, bits=bits)


def make_layer_forwards(
    choice: str, weights: Mapping[str, NestedWeight], device: torch.device, dtype: torch.dtype, cache_bytes: int
) -> LayerForwards:
    """Construct the implementation that ``search.layer_forward`` names.

    ``auto`` means planes on a GPU with CuPy and a half-precision dtype, otherwise dense weights.
    """
    has_kernels = device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("cupy") is not None
    if choice == PlaneLayerForwards.name or (choice == "auto" and has_kernels):
        return PlaneLayerForwards(weights, device, dtype)
    return DenseLayerForwards(weights, device, dtype, cache_bytes)
