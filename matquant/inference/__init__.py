"""Inference at any bit-width from one resident copy of a parent.

    layers = replace_linears(model, parent)      # a Transformers model and a parent artifact
    set_bits(model, 3)                           # all layers
    set_bits(model, {"model.layers.0.mlp.down_proj": 4})
    set_bits(model, 2, prefill=8)                # prefill at 8 bits, decoding at 2 bits

``NestedPlanes`` is the weight of one layer as bit planes, ``NestedLinear`` the layer. ``linear`` and ``dequantize`` call the
operators of ``inference.ops`` with a ``NestedPlanes``. A matmul at b bits reads the first b planes and the scales.
"""

from matquant.formats.planes import NestedPlanes
from matquant.inference.linear import NestedLinear
from matquant.inference.model_surgery import nested_layers, replace_linears, set_bits
from matquant.inference.ops import dequantize, linear

__all__ = ["NestedLinear", "NestedPlanes", "dequantize", "linear", "nested_layers", "replace_linears", "set_bits"]
