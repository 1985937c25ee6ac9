"""The operators ``torch.ops.matquant.nested_linear`` and ``nested_decode``.

    nested_linear(x, planes, scales, zeros, bias, bits, out_features, group_size, master_bits, slicing, offset) -> y
    nested_decode(planes, scales, zeros, bits, out_features, in_features, group_size, master_bits, slicing, offset, dtype)

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

from matquant.inference import blocked, gpu
from matquant.inference.checks import check_x
from matquant.inference.planes import NestedPlanes, check_bits, check_layout
from matquant.nested import Slicing

_MEANING = "int group_size, int master_bits, str slicing, float offset"

_library = torch.library.Library("matquant", "DEF")
_library.define(
    "nested_linear(Tensor x, Tensor planes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int out_features, "
    f"{_MEANING}) -> Tensor"
)
_library.define(
    "nested_decode(Tensor planes, Tensor scales, Tensor? zeros, int bits, int out_features, int in_features, "
    f"{_MEANING}, ScalarType dtype) -> Tensor"
)


def linear(x: Tensor, weight: NestedPlanes, bits: int, bias: Tensor | None = None) -> Tensor:
    """``nested_linear`` for a ``NestedPlanes``: x W^T + bias, with W at ``bits`` bits."""
    return torch.ops.matquant.nested_linear.default(
        x, weight.planes, weight.scales, weight.zeros, bias, bits, weight.out_features, weight.group_size,
        weight.master_bits, weight.slicing, weight.offset,
    )  # fmt: skip


def decode(weight: NestedPlanes, bits: int, dtype: torch.dtype) -> Tensor:
    """``nested_decode`` for a ``NestedPlanes``: the dense weight [out_features, in_features] at ``bits`` bits."""
    return torch.ops.matquant.nested_decode.default(
        weight.planes, weight.scales, weight.zeros, bits, weight.out_features, weight.in_features, weight.group_size,
        weight.master_bits, weight.slicing, weight.offset, dtype,
    )  # fmt: skip


def _linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, out_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float,
) -> Tensor:  # fmt: skip
    check_x(x, planes, bias, out_features)
    weight = NestedPlanes(
        planes=planes, scales=scales, zeros=zeros, out_features=out_features, in_features=x.shape[-1],
        group_size=group_size, master_bits=master_bits, slicing=slicing, offset=offset,
    )  # fmt: skip
    return blocked.linear(x, weight, bias, bits)


def _decode(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, out_features: int, in_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = NestedPlanes(
        planes=planes, scales=scales, zeros=zeros, out_features=out_features, in_features=in_features,
        group_size=group_size, master_bits=master_bits, slicing=slicing, offset=offset,
    )  # fmt: skip
    return weight.decode(bits, dtype)


def _fake_linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, out_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float,
) -> Tensor:  # fmt: skip
    check_x(x, planes, bias, out_features)
    check_layout(planes, scales, zeros, out_features, x.shape[-1], group_size)
    check_bits(bits, planes.shape[0], master_bits, slicing)
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_decode(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, out_features: int, in_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_layout(planes, scales, zeros, out_features, in_features, group_size)
    check_bits(bits, planes.shape[0], master_bits, slicing)
    return scales.new_empty(out_features, in_features, dtype=dtype)


_library.impl("nested_linear", _linear, "CPU")
_library.impl("nested_linear", gpu.linear, "CUDA")
_library.impl("nested_decode", _decode, "CPU")
_library.impl("nested_decode", gpu.decode, "CUDA")
torch.library.register_fake("matquant::nested_linear", _fake_linear, lib=_library)
torch.library.register_fake("matquant::nested_decode", _fake_decode, lib=_library)
