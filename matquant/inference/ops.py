"""The operators ``torch.ops.matquant.nested_linear`` and ``nested_decode``.

    nested_linear(x, planes, scales, zeros, bias, bits, out_features, group_size, master_bits, slicing, offset) -> y
    nested_decode(planes, scales, zeros, bits, out_features, in_features, group_size, master_bits, slicing, offset, dtype)

take the tensors of a ``NestedPlanes`` and what they mean; ``x`` is [..., in_features] in float16, bfloat16 or float32, ``y``
[..., out_features] in the same dtype. On CUDA devices they run the kernels of ``kernels/``, elsewhere plain torch. They work in
graphs of ``torch.compile``, which are made anew for each width, and in CUDA graphs. There is no backward pass.

Raises:
    UserError: a tensor of the wrong dtype, device, shape or layout, a width that is not there, or no CuPy on a CUDA device.
        Before anything is launched.
"""

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.inference import blocked
from matquant.inference.planes import NestedPlanes, check_bits, check_layout
from matquant.nested import Slicing

ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
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


def _check_x(x: Tensor, planes: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Raises UserError unless ``x`` and ``bias`` go with the planes; how many features, ``check_layout`` finds."""
    if x.dtype not in ACTIVATIONS:
        raise UserError(f"x must be float16, bfloat16 or float32; found {x.dtype}. Convert it first.")
    if not x.ndim:
        raise UserError("x must be [..., in_features]; found a single number.")
    if x.device != planes.device:
        raise UserError(f"x is on {x.device}, the planes are on {planes.device}. Move one of them.")
    if bias is not None and (bias.shape != (out_features,) or bias.device != x.device or bias.dtype not in ACTIVATIONS):
        found = f"{bias.dtype} {list(bias.shape)} on {bias.device}"
        raise UserError(f"The bias must be float16, bfloat16 or float32 [{out_features}] on {x.device}; found {found}.")


def _linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, out_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float,
) -> Tensor:  # fmt: skip
    _check_x(x, planes, bias, out_features)
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
    _check_x(x, planes, bias, out_features)
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
_library.impl("nested_decode", _decode, "CPU")
torch.library.register_fake("matquant::nested_linear", _fake_linear, lib=_library)
torch.library.register_fake("matquant::nested_decode", _fake_decode, lib=_library)
