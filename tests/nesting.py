"""Random models with nested layers in place of all linear layers of their blocks, and the same with dense layers."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from weights import rounded_weight

from matquant.inference import NestedLinear, nested_layers, set_bits
from matquant.inference.experts import is_fused_experts, split_fused_experts


def nest(model: Any) -> Any:
    """Replace the linear layers of a model's blocks, experts included, by nested ones at 8 bits."""
    for path, module in list(model.named_modules()):
        if is_fused_experts(module):
            _replace(model, path, split_fused_experts(module, path)[0])
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and path != "lm_head":
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            _replace(model, path, NestedLinear.from_planes(rounded_weight(weight.detach()), module.bias))
    set_bits(model, 8)
    return model.eval()


def dequantized_copy(model: Any, bits: int) -> Any:
    """Copy of a nested model with dense layers, whose weights are the nested ones at ``bits`` bits."""
    dense = copy.deepcopy(model)
    for path, layer in nested_layers(dense).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.nested_planes().dequantize(bits, torch.float32), requires_grad=False)
        linear.bias = layer.bias
        _replace(dense, path, linear)
    return dense


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
