"""Operators ``torch.ops.matquant.nested_linear`` and ``torch.ops.matquant.nested_dequantize``.

    nested_linear(x, planes, scales, zeros, bias, bits, out_features, in_features,
                  group_size, master_bits, slicing, offset, stretch) -> y
    nested_dequantize(planes, scales, zeros, bits, out_features, in_features,
                      group_size, master_bits, slicing, offset, stretch, dtype) -> weight

They take the tensors of a ``NestedPlanes``, with the set of scales of the bit-width, and its format as flat arguments, see
``WeightFormat.op_args``. ``x`` is
[..., in_features] in float16, bfloat16 or float32, ``y`` [..., out_features] in the same dtype. On CUDA devices they launch
the kernels of ``kernels/``, elsewhere they run plain torch. They work in CUDA graphs and under ``torch.compile``, with one
graph per bit-width. The operators record no gradients; ``linear`` and ``NestedLinear`` do, with respect to ``x`` and ``bias``.
On CUDA devices these two leave the operator out where nothing follows operators, see ``direct_calls``.

For up to 16 tokens the error of the kernels is that of rounding the exact result. For more tokens they may round weights to the
dtype of ``x`` first, as a dense matrix would hold them.

Raises:
    UserError: a tensor of the wrong dtype, device, shape or layout, a bit-width that the planes do not hold, or no CuPy on a
        CUDA device, a tensor that requires a gradient. Nothing has been launched then.
"""

from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.nested import Slicing, WeightFormat
from matquant.formats.planes import NestedPlanes, check_layout
from matquant.inference import cuda_ops, torch_reference
from matquant.inference.argument_checks import check_no_gradient, check_x
from matquant.inference.direct_calls import takes_direct_call

_FORMAT_SCHEMA = "int group_size, int master_bits, str slicing, float offset, float stretch"

_library = torch.library.Library("matquant", "DEF")
_library.define(
    "nested_linear(Tensor x, Tensor planes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int out_features, "
    f"int in_features, {_FORMAT_SCHEMA}) -> Tensor"
)
_library.define(
    "nested_dequantize(Tensor planes, Tensor scales, Tensor? zeros, int bits, int out_features, int in_features, "
    f"{_FORMAT_SCHEMA}, ScalarType dtype) -> Tensor"
)


def linear(x: Tensor, weight: NestedPlanes, bits: int, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias with W at ``bits`` bits: ``differentiable_linear`` for a ``NestedPlanes``."""
    return differentiable_linear(
        x,
        weight.planes,
        weight.scales_at(bits),
        weight.zeros,
        bias,
        bits,
        weight.out_features,
        weight.in_features,
        *weight.format.op_args,
    )


def differentiable_linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *settings: Any
) -> Tensor:
    """Operator ``nested_linear`` with gradients with respect to ``x`` and ``bias``.

    The backward pass holds the dense weight of the layer, in the dtype of ``x``.

    Args:
        settings: other arguments of the operator.

    Raises:
        UserError: as the operator, and for scales that require a gradient.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _DifferentiableLinear.apply(x, planes, scales, zeros, bias, *settings)
        return y
    return nested_linear(x, planes, scales, zeros, bias, *settings)


def nested_linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *settings: Any
) -> Tensor:
    """Operator ``nested_linear``, called without torch's dispatcher where that makes no difference, see ``direct_calls``."""
    if takes_direct_call(x, planes, scales, zeros, bias):
        return cuda_ops.linear(x, planes, scales, zeros, bias, *settings)
    y: Tensor = torch.ops.matquant.nested_linear.default(x, planes, scales, zeros, bias, *settings)
    return y


class _DifferentiableLinear(torch.autograd.Function):
    """Gradients of y = x W^T + bias: dL/dx = dL/dy W, and dL/dbias is the sum of dL/dy over tokens."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = torch.ops.matquant.nested_linear.default(*arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, planes, scales, zeros, bias, *ctx.settings = inputs
        if scales.requires_grad:
            raise UserError(
                "The scales of a nested layer require a gradient, but have none. Call scales.detach() first."
            )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(planes, scales, zeros)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = gradients  # (..., out_features)
        bits, out_features, in_features, *op_args = ctx.settings
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = torch.ops.matquant.nested_dequantize.default(
                *ctx.saved_tensors, bits, out_features, in_features, *op_args, grad_y.dtype
            )
            grad_x = grad_y @ weight
        if ctx.needs_input_grad[4]:
            grad_bias = grad_y.reshape(-1, out_features).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, *(None for _ in ctx.settings)


def dequantize(weight: NestedPlanes, bits: int, dtype: torch.dtype) -> Tensor:
    """Dense weight [out_features, in_features] at ``bits`` bits: ``nested_dequantize`` for a ``NestedPlanes``."""
    dense: Tensor = torch.ops.matquant.nested_dequantize.default(
        weight.planes,
        weight.scales_at(bits),
        weight.zeros,
        bits,
        weight.out_features,
        weight.in_features,
        *weight.format.op_args,
        dtype,
    )
    return dense


def _nested_planes(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, in_features: int, fmt: WeightFormat
) -> NestedPlanes:
    return NestedPlanes(
        planes=planes, scales=scales, zeros=zeros, out_features=out_features, in_features=in_features, format=fmt
    )


def _linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    *op_args: Any,
) -> Tensor:
    check_no_gradient(x, scales, bias)
    check_x(x, planes, bias, out_features, in_features)
    fmt = WeightFormat.from_op_args(scales, zeros, *op_args)
    weight = _nested_planes(planes, scales, zeros, out_features, in_features, fmt)
    return torch_reference.linear(x, weight, bias, bits)


def _fake_linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    *op_args: Any,
) -> Tensor:
    fmt = WeightFormat.from_op_args(scales, zeros, *op_args)
    check_x(x, planes, bias, out_features, in_features)
    check_layout(planes, scales, zeros, out_features, in_features, fmt)
    fmt.check_bits(bits, planes.shape[0])
    return x.new_empty(*x.shape[:-1], out_features)


def _dequantize(
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
    stretch: float,
    dtype: torch.dtype,
) -> Tensor:
    fmt = WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset, stretch)
    return _nested_planes(planes, scales, zeros, out_features, in_features, fmt).dequantize(bits, dtype)


def _fake_dequantize(
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
    stretch: float,
    dtype: torch.dtype,
) -> Tensor:
    fmt = WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset, stretch)
    check_layout(planes, scales, zeros, out_features, in_features, fmt)
    fmt.check_bits(bits, planes.shape[0])
    return scales.new_empty(out_features, in_features, dtype=dtype)


_library.impl("nested_linear", _linear, "CPU")
_library.impl("nested_linear", cuda_ops.linear, "CUDA")
_library.impl("nested_dequantize", _dequantize, "CPU")
_library.impl("nested_dequantize", cuda_ops.dequantize, "CUDA")
torch.library.register_fake("matquant::nested_linear", _fake_linear, lib=_library)
torch.library.register_fake("matquant::nested_dequantize", _fake_dequantize, lib=_library)
