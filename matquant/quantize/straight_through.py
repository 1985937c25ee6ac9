"""Straight-through quantization: slices of a real-valued weight, differentiable with respect to the weight and its range.

Codes, scales and zero points are those of MatQuant (arXiv 2502.06786, equations 1, 3 and 6) in groups of input features: with
the range [l, h] of a group, M master bits and b bits of a slice

    s = (h - l) / (2^M - 1)     z = round(-l / s)     q = clamp(round(w / s + z), 0, 2^M - 1)
    slice = s (2^(M - b) min(round(q / 2^(M - b)), 2^b - 1) - z)

Scales are rounded to the dtype in which a parent stores them, and zero points are whole numbers, so a slice has exactly the
values that ``NestedWeight.dequantize`` gives. A rounding has the derivative of the identity (straight-through estimator,
arXiv 1308.3432); a clamp keeps its own derivative, which is 0 where it acts.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matquant.formats.nested import NestedWeight, WeightFormat


class _Round(torch.autograd.Function):
    """Nearest whole number, halves upwards as in ``formats.nested``; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.floor(x + 0.5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Store(torch.autograd.Function):
    """Value after a conversion to another dtype and back; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each group, 0 included: float32 [rows, groups] each, from [rows, in_features]."""
    groups = _grouped(weight, group_size)
    return groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MinMaxGrid:
    """Scales and zero points of a weight, differentiable with respect to the ranges that they were made from.

    Attributes:
        scales: float32 [rows, groups], values of the stored dtype.
        zeros: float32 [rows, groups], whole numbers from 0 to 2^master_bits - 1.
        format: of the stored weight: round slicing, a zero point for each group.
    """

    scales: Tensor
    zeros: Tensor
    format: WeightFormat

    @classmethod
    def of_ranges(cls, lowest: Tensor, highest: Tensor, format: WeightFormat) -> "MinMaxGrid":
        """Grid whose first and last code stand for the ends of each range: float32 [rows, groups] each."""
        largest_code = 2**format.master_bits - 1
        scales: Tensor = _Store.apply((highest - lowest) / largest_code, format.scale_dtype)
        zeros = _Round.apply(-lowest / _divisor(scales)).clamp(0, largest_code)
        return cls(scales=scales, zeros=zeros, format=format)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of a weight: float32 whole numbers [rows, groups, group_size], 0 for the padding of a short last group.

        Args:
            weight: float32 [rows, in_features].
        """
        positions = _grouped(weight, self.format.group_size) / _divisor(self.scales)[..., None] + self.zeros[..., None]
        codes: Tensor = _Round.apply(positions)
        return codes.clamp(0, 2**self.format.master_bits - 1)

    def slice(self, codes: Tensor, bits: int, in_features: int) -> Tensor:
        """Dense weight of ``bits`` bits: float32 [rows, in_features], from ``codes``."""
        step = 2.0 ** (self.format.master_bits - bits)
        kept: Tensor = _Round.apply(codes / step).clamp(max=2**bits - 1) * step
        dense = (kept - self.zeros[..., None]) * self.scales[..., None]
        return dense.flatten(1)[:, :in_features]

    @torch.no_grad()
    def to_nested(self, codes: Tensor, in_features: int) -> NestedWeight:
        """Weight to store, from ``codes``."""
        return NestedWeight(
            codes=codes.flatten(1)[:, :in_features].to(torch.uint8).contiguous(),
            scales=self.scales.to(self.format.scale_dtype),
            zeros=self.zeros.to(torch.uint8),
            format=self.format,
        )


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """Weight by groups, the last one padded with zeros: [rows, in_features] to [rows, groups, group_size]."""
    padded = F.pad(weight, (0, -weight.shape[1] % group_size))
    return padded.view(len(padded), -1, group_size)


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of 0, which is the scale of a group of zeros."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
