"""Modules that a nested layer can stand for: they compute x Wᵀ + bias, and nothing else."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PROBE_SIZES = (3, 2)  # input and output features


def is_linear(module: nn.Module) -> bool:
    """Return True for an ``nn.Linear`` or a subclass that computes the same, whose weight is a parameter of its own.

    A subclass with another forward (a router that also chooses experts, a layer that quantizes its inputs) is no linear
    layer unless it gives the outputs of one. Hooks of accelerate around a forward do not count.
    """
    if not isinstance(module, nn.Linear) or not isinstance(module._parameters.get("weight"), Tensor):
        return False
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return not replaced and (type(module).forward is nn.Linear.forward or _computes_linear(module))


def _computes_linear(module: nn.Linear) -> bool:
    """Compare the forward of a module's class with ``F.linear`` for a small weight, also in half precision."""
    with torch.no_grad(), torch.device("cpu"):  # models are built in the context of the meta device
        return all(_agrees(module, dtype, error) for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))


def _agrees(module: nn.Linear, dtype: torch.dtype, tolerance: float) -> bool:
    """Compare the outputs for inputs of very different sizes in one dtype."""
    inputs, outputs = _PROBE_SIZES
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = None if module.bias is None else torch.randn(outputs, generator=generator).to(dtype)
    x = (torch.randn(1, 4, inputs, generator=generator) * torch.tensor([1e-2, 1.0, 1e2])).to(dtype)
    own = dict(module._parameters)
    module._parameters.update(weight=_parameter(weight), bias=_parameter(bias))
    try:
        found = type(module).forward(module, x)
    except Exception:  # any code: one that does not accept a small weight is not taken for a linear layer
        return False
    finally:
        module._parameters.update(own)
    expected = F.linear(x, weight, bias)
    same_kind = isinstance(found, Tensor) and found.dtype == dtype and found.shape == expected.shape
    return same_kind and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _parameter(tensor: Tensor | None) -> Any:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
