"""Matmul in plain torch, on any device. Dequantizes a strip of rows at a time, never the whole weight."""

import torch
from torch import Tensor

from matquant.formats.planes import NestedPlanes


def linear(x: Tensor, weight: NestedPlanes, bias: Tensor | None, bits: int) -> Tensor:
    """Compute x W^T + bias with W at ``bits`` bits, in float32, rounded once to the dtype of ``x``.

    Args:
        x: [..., in_features].
        bias: [out_features].

    Returns:
        [..., out_features], in the dtype of ``x``.
    """
    rows = x.reshape(x.shape[:-1].numel(), weight.in_features).float()
    result = rows.new_empty(weight.out_features, rows.shape[0])
    for strip, values in weight.dequantize_strips(bits):
        torch.mm(values, rows.t(), out=result[strip])
    if bias is not None:
        result += bias.float()[:, None]
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    y.view(rows.shape[0], weight.out_features).copy_(result.t())
    return y
