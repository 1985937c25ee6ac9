"""One-shot nested quantization of one weight matrix: a function from tensors to tensors.

GPTQ (arXiv 2210.17323) keeps one error-compensated copy of the weights. Its exact extension to

    min  sum_b lambda_b tr( (W - W_b) H (W - W_b)^T )       H = 2 X^T X / n + damping

over the codes of all widths b at once keeps one compensated target per width: the code of a column is the one of least
sum_b lambda_b (t_b - w_b(q))^2, and each width's own error is fed back into its own target. MatGPTQ v1 (arXiv 2602.03537)
keeps a single target and feeds back the unweighted mean of the widths' errors (``feedback="mean"``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from matquant.nested import NestedWeight, Slicing, levels
from matquant.quantize import rows
from matquant.quantize.linalg import damped, inverse_factor

# Clips of a group's range that the scale search tries. Two bits want a grid well inside the range, eight bits nearly all.
_CLIPS = np.linspace(1.0, 0.4, 25, dtype=np.float32)

# Mantissa bits and smallest normal exponent of the dtypes in which scales are stored.
_SCALE_FORMATS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    """What a solve depends on besides its tensors; fields as in ``matquant.config.MethodConfig``.

    Attributes:
        weights: width in bits to lambda; widths of weight zero are left out.
        scale_dtype: dtype in which scales are stored; codes are chosen with the stored values.
    """

    weights: Mapping[int, float]
    master_bits: int = 8
    slicing: Slicing = "msb"
    feedback: Literal["per_width", "mean"] = "per_width"
    group_size: int = 128
    symmetric: bool = True
    scale: Literal["minmax", "search"] = "search"
    act_order: bool = False
    sweeps: int = 0
    damp: float = 0.01
    block_size: int = 128
    scale_dtype: torch.dtype = torch.float16

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted(b for b, weight in self.weights.items() if weight > 0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """The chosen codes, and the sentences that the user should read (empty when all went as asked)."""

    weight: NestedWeight
    notes: tuple[str, ...] = ()


def solve(weight: Tensor, hessian: Tensor | None, options: SolverOptions, layer: str = "this layer") -> Solution:
    """Quantize one weight matrix.

    Args:
        weight: [out_features, in_features], any float dtype.
        hessian: float32 [in_features, in_features], 2 X^T X / n without damping; None rounds to nearest.
        options: how.
        layer: its name, for sentences.

    Raises:
        UserError: the Hessian is not finite, or no damping makes it positive definite.
        ValueError: the group size does not divide in_features, or does not align with the block size.
    """
    columns = weight.shape[1]
    group_size = columns if options.group_size == -1 else options.group_size
    _check_shapes(columns, group_size, options.block_size)
    target = weight.detach().float().cpu()
    if hessian is None:
        state = _State.start(target, group_size, options)
        state.solve(None, options)
        return Solution(weight=state.finish(None, options))
    hessian = hessian.cpu()
    order = _column_order(hessian, group_size) if options.act_order else None
    if order is not None:
        target, hessian = target[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, options.damp, layer)
    state = _State.start(target, group_size, options)
    state.solve(factor.upper, options)
    hessian = damped(hessian, factor.damp)
    for _ in range(options.sweeps):
        state.sweep(target, hessian, options.block_size)
    return Solution(weight=state.finish(order, options), notes=(factor.note,) if factor.note else ())


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - W_b) H (W - W_b)^T) / tr(W H W^T): the share of a layer's output energy that is lost.

    Args:
        weight, quantized: [out_features, in_features].
        hessian: float32 [in_features, in_features].
    """
    weight = weight.float()
    error = weight - quantized
    lost = torch.einsum("ij,ij->", error @ hessian, error)
    whole = torch.einsum("ij,ij->", weight @ hessian, weight)
    return float(lost / whole) if whole > 0 else 0.0


def _check_shapes(columns: int, group_size: int, block_size: int) -> None:
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} input features")
    if group_size % block_size and block_size % group_size:
        raise ValueError(f"block size {block_size} and group size {group_size} do not align")


def _column_order(hessian: Tensor, group_size: int) -> Tensor:
    """Columns by falling diagonal of the Hessian within their group, groups by their largest.

    Groups stay whole, so that the stored matrix keeps its order and no runtime has to permute its input.
    """
    diagonal = hessian.diagonal().cpu().view(-1, group_size)
    within = diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.amax(1).argsort(descending=True, stable=True)
    first = torch.arange(len(groups))[:, None] * group_size
    return (first + within)[groups].flatten()


@dataclasses.dataclass(slots=True)
class _State:
    """The arrays that the compiled row solver works on; names and shapes as in ``rows``."""

    targets: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    lam: np.ndarray
    base: np.ndarray
    group_size: int

    @classmethod
    def start(cls, weight: Tensor, group_size: int, options: SolverOptions) -> "_State":
        out_features, columns = weight.shape
        widths = options.widths
        count = 1 if options.feedback == "mean" else len(widths)
        tables = [levels(b, options.master_bits, options.slicing) for b in (*widths, options.master_bits)]
        groups = columns // group_size
        return cls(
            targets=weight.repeat(count, 1, 1),
            codes=torch.zeros(out_features, columns, dtype=torch.uint8),
            scales=torch.zeros(out_features, groups),
            zeros=torch.zeros(out_features, groups),
            lam=np.array([options.weights[b] for b in widths], dtype=np.float32),
            base=torch.stack(tables).float().numpy(),
            group_size=group_size,
        )

    def solve(self, upper: Tensor | None, options: SolverOptions) -> None:
        """Choose all codes, column by column in blocks; without a factor nothing is fed back."""
        count, out_features, columns = self.targets.shape
        clips = _CLIPS if options.scale == "search" else _CLIPS[:1]
        mantissa_bits, min_exponent = _SCALE_FORMATS[options.scale_dtype]
        importance = torch.ones(columns) if upper is None else upper.diagonal() ** -2
        importance = importance / importance.mean()
        for first in range(0, columns, options.block_size):
            last = min(first + options.block_size, columns)
            block = torch.eye(last - first) if upper is None else upper[first:last, first:last].contiguous()
            errors = torch.empty(count, out_features, last - first)
            rows.solve_columns(
                self.targets.numpy(), errors.numpy(), self.codes.numpy(), self.scales.numpy(), self.zeros.numpy(),
                block.numpy(), importance.numpy(), self.lam, self.base, first, last, self.group_size, clips,
                options.symmetric, mantissa_bits, min_exponent,
            )  # fmt: skip
            if upper is not None and last < columns:
                later = self.targets.view(-1, columns)[:, last:]
                later.addmm_(errors.view(-1, last - first), upper[first:last, last:], alpha=-1)

    def sweep(self, weight: Tensor, hessian: Tensor, block_size: int) -> None:
        """One pass of coordinate descent over all columns against the damped Hessian."""
        out_features, columns = weight.shape
        gradient = torch.stack([(self._values(k) - weight) @ hessian for k in range(len(self.lam))])
        for first in range(0, columns, block_size):
            last = min(first + block_size, columns)
            moves = torch.empty(len(self.lam), out_features, last - first)
            rows.sweep_columns(
                self.codes.numpy(), moves.numpy(), gradient[:, :, first:last].contiguous().numpy(),
                hessian[first:last, first:last].contiguous().numpy(), self.scales.numpy(), self.zeros.numpy(),
                self.lam, self.base, first, last, self.group_size,
            )  # fmt: skip
            gradient.view(-1, columns).addmm_(moves.view(-1, last - first), hessian[first:last])

    def _values(self, k: int) -> Tensor:
        """The decoded weight [rows, columns] at the k-th width."""
        table = torch.from_numpy(self.base[k])
        grouped = table[self.codes.int()].view(*self.scales.shape, -1)
        return ((grouped - self.zeros[:, :, None]) * self.scales[:, :, None]).view(self.codes.shape)

    def finish(self, order: Tensor | None, options: SolverOptions) -> NestedWeight:
        """The result in the columns' stored order."""
        codes, scales, zeros = self.codes, self.scales, self.zeros
        if order is not None:
            codes = codes[:, order.argsort()].contiguous()
            stored = (order.view(-1, self.group_size)[:, 0] // self.group_size).argsort()
            scales, zeros = scales[:, stored].contiguous(), zeros[:, stored].contiguous()
        return NestedWeight(
            codes=codes,
            scales=scales.to(options.scale_dtype),
            zeros=None if options.symmetric else zeros.to(torch.uint8),
            master_bits=options.master_bits,
            slicing=options.slicing,
        )
