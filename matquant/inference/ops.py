"""The operators ``torch.ops.matquant.nested_linear`` and ``nested_dequantize``.

    nested_linear(x, planes, scales, zeros, bias, bits, out_features, group_size, master_bits, slicing, offset) -> y
    nested_dequantize(planes, scales, zeros, bits, out_features, in_features, group_size, master_bits, slicing, offset, dtype)

take the tensors of a ``NestedPlanes`` and what they mean; ``x`` is [..., in_features] in float16, bfloat16 or float32, ``y``
[..., out_features] in the same dtype. On CUDA devices they run the kernels of ``kernels/``, elsewhere plain torch. They work in
graphs of ``torch.compile``, which are made anew for each width, and in CUDA graphs. There is no backward pass.

For up to 64 tokens the kernels' error is that of rounding the exact result; for more they may round weights to x's dtype first,
as a dense matrix would hold them.

Raises:
    UserError: a tensor of the wrong dtype, device, shape or layout, a width that is not there, or no CuPy on a CUDA device.
        Before anything is launched.
"""

import torch
from torch import Tensor

from matquant.formats.nested import Slicing, WeightFormat
from matquant.formats.planes import NestedPlanes, check_bits, check_layout
from matquant.inference import cuda_ops, torch_reference
from matquant.inference.argument_checks import check_x

_MEANING = "int group_size, int master_bits, str slicing, float offset"

_library = torch.library.Library("matquant", "DEF")
_library.define(
    "nested_linear(Tensor x, Tensor planes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int out_features, "
    f"{_MEANING}) -> Tensor"
)
_library.define(
    "nested_dequantize(Tensor planes, Tensor scales, Tensor? zeros, int bits, int out_features, int in_features, "
    f"{_MEANING}, ScalarType dtype) -> Tensor"
)


def linear(x: Tensor, weight: NestedPlanes, bits: int, bias: Tensor | None = None) -> Tensor:
    """``nested_linear`` for a ``NestedPlanes``: x W^T + bias, with W at ``bits`` bits."""
    return torch.ops.matquant.nested_linear.default(
        x, weight.planes, weight.scales, weight.zeros, bias, bits, weight.out_features, *weight.format.op_args
    )


def dequantize(weight: NestedPlanes, bits: int, dtype: torch.dtype) -> Tensor:
    """``nested_dequantize`` for a ``NestedPlanes``: the dense weight [out_features, in_features] at ``bits`` bits."""
    return torch.ops.matquant.nested_dequantize.default(
        weight.planes,
        weight.scales,
        weight.zeros,
        bits,
        weight.out_features,
        weight.in_features,
        *weight.format.op_args,
        dtype,
    )


def _linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
) -> Tensor:
    check_x(x, planes, bias, out_features)
    weight = NestedPlanes(
        planes=planes,
        scales=scales,
        zeros=zeros,
        out_features=out_features,
        in_features=x.shape[-1],
        format=WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset),
    )
    return torch_reference.linear(x, weight, bias, bits)


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
    dtype: torch.dtype,
) -> Tensor:
    weight = NestedPlanes(
        planes=planes,
        scales=scales,
        zeros=zeros,
        out_features=out_features,
        in_features=in_features,
        format=WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset),
    )
    return weight.dequantize(bits, dtype)


def _fake_linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
) -> Tensor:
    check_x(x, planes, bias, out_features)
    check_layout(planes, scales, zeros, out_features, x.shape[-1], group_size)
    check_bits(
        bits, planes.shape[0], WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset)
    )
    return x.new_empty(*x.shape[:-1], out_features)


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
    dtype: torch.dtype,
) -> Tensor:
    check_layout(planes, scales, zeros, out_features, in_features, group_size)
    check_bits(
        bits, planes.shape[0], WeightFormat.from_op_args(scales, zeros, group_size, master_bits, slicing, offset)
    )
    return scales.new_empty(out_features, in_features, dtype=dtype)


_library.impl("nested_linear", _linear, "CPU")
_library.impl("nested_linear", cuda_ops.linear, "CUDA")
_library.impl("nested_dequantize", _dequantize, "CPU")
_library.impl("nested_dequantize", cuda_ops.dequantize, "CUDA")
torch.library.register_fake("matquant::nested_linear", _fake_linear, lib=_library)
torch.library.register_fake("matquant::nested_dequantize", _fake_dequantize, lib=_library)
