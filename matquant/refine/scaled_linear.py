"""Linear map with the weight of a slice, differentiable with respect to input and scales.

Only the codes are in memory: the dense weight is computed in the forward pass, and again in the backward pass.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matquant.formats.groups import multiply_groups, subtract_zero_points, sum_groups
from matquant.formats.nested import NestedWeight, WeightFormat


def scaled_linear(x: Tensor, scales: Tensor, weight: NestedWeight, bits: int, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias, where W is the slice of ``bits`` bits with other scales.

    Args:
        x: [..., in_features].
        scales: float32 [out_features, groups].
        weight: codes and zero points, on the device of ``x``; its own scales are not read.

    Returns:
        [..., out_features], in the dtype of ``x``.
    """
    output: Tensor = _ScaledLinear.apply(x, scales, weight, bits)
    return output if bias is None else output + bias


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, weight: NestedWeight, bits: int) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.weight, ctx.bits = weight, bits
        return F.linear(x, multiply_groups(_offsets(weight, bits), scales, weight.format.group_size).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,), (x, scales) = gradients, ctx.saved_tensors
        offsets, group_size = _offsets(ctx.weight, ctx.bits), ctx.weight.format.group_size
        grad_x = grad_scales = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
            grad_scales = sum_groups(grad_weight.float().mul_(offsets), group_size)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ multiply_groups(offsets, scales, group_size).to(x.dtype)
        return grad_x, grad_scales, None, None


def _offsets(weight: NestedWeight, bits: int) -> Tensor:
    """Differences of the values of the slice of ``bits`` bits from their zero points: float32 [out_features, in_features]."""
    values = _levels(weight.format, bits, weight.codes.device)[weight.codes.int()]
    zero_points = weight.format.zero_point if weight.zeros is None else weight.zeros.float()
    return subtract_zero_points(values, zero_points, weight.format.group_size)


@functools.cache
def _levels(fmt: WeightFormat, bits: int, device: torch.device) -> Tensor:
    return fmt.levels(bits).to(device)
