"""Checks of tensors, shared by the CPU and CUDA implementations of the operators."""

import torch
from torch import Tensor

from matquant.errors import UserError

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_x(x: Tensor, planes: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> None:
    """Check dtypes, devices, and the shapes of ``x`` [..., in_features] and ``bias`` [out_features].

    Raises:
        UserError: ``x`` or ``bias`` does not fit the planes.
    """
    if x.dtype not in ACTIVATION_DTYPES:
        raise UserError(f"x must be float16, bfloat16 or float32; found {x.dtype}. Convert it first.")
    if not x.ndim:
        raise UserError("x must be [..., in_features]; found a tensor without dimensions.")
    if x.shape[-1] != in_features:
        raise UserError(f"x must be [..., {in_features}]; found {list(x.shape)}.")
    if x.device != planes.device:
        raise UserError(f"x is on {x.device}, the planes are on {planes.device}. Move one of them.")
    if bias is not None and (
        bias.shape != (out_features,) or bias.device != x.device or bias.dtype not in ACTIVATION_DTYPES
    ):
        found = f"{bias.dtype} {list(bias.shape)} on {bias.device}"
        raise UserError(f"The bias must be float16, bfloat16 or float32 [{out_features}] on {x.device}; found {found}.")


def check_no_gradient(x: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Check that no tensor needs a gradient, which the operator itself would lose. Raises UserError."""
    if torch.is_grad_enabled() and (
        x.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad)
    ):
        raise UserError(
            "torch.ops.matquant.nested_linear records no gradient, but x, the scales or the bias require one. Call "
            "matquant.inference.linear or a NestedLinear, which have gradients with respect to x and the bias, or use "
            "torch.no_grad()."
        )
