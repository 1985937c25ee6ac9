"""Operators of mixtures of experts in plain torch, and the checks of their arguments."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.nested import Slicing, WeightFormat
from matquant.formats.planes import NestedPlanes, check_layout, read_scales
from matquant.formats.tile_layout import TILE
from matquant.inference import torch_reference
from matquant.inference.argument_checks import check_no_gradient, check_x
from matquant.inference.kernel_families.moe import BLOCK_M
from matquant.inference.moe_launch import MAX_EXPERTS, max_items


class GroupedCall(NamedTuple):
    """Arguments of ``nested_grouped_linear``, in the order of its schema; see ``expert_ops``."""

    x: Tensor
    pairs: Tensor
    items: Tensor
    planes: Tensor
    scales: Sequence[Tensor]
    scale_bits: Sequence[int]
    zeros: Tensor | None
    bits: Sequence[int]
    out_features: Sequence[int]
    in_features: int
    block_m: int
    group_size: int
    master_bits: int
    slicing: Slicing
    offset: float
    stretch: float

    @property
    def format(self) -> WeightFormat:
        """Meaning of the codes."""
        return WeightFormat.from_op_args(self.scales[0], self.zeros, *self[-5:])

    @property
    def pairs_per_row(self) -> int:
        """Pairs that share a row of ``x``. Raises UserError if it is no whole number."""
        count, rows = self.pairs.shape[0], self.x.shape[0]
        if self.x.ndim != 2 or count % max(rows, 1) or (count and not rows):
            raise UserError(
                f"x must be [pairs, in_features] or [tokens, in_features] for {count} pairs; found {list(self.x.shape)}."
            )
        return count // max(rows, 1)

    def scales_at(self, bits: int) -> Tensor:
        """Set of scales that ``bits`` bits read."""
        return read_scales(self.scales, self.scale_bits, bits)


def check_routing(experts: Tensor, held: Sequence[int], block_m: int) -> None:
    """Check the arguments of ``route_experts``. Raises UserError."""
    if experts.dtype not in (torch.int32, torch.int64) or experts.ndim != 2:
        raise UserError(f"experts must be int32 or int64 [tokens, k]; found {experts.dtype} {list(experts.shape)}.")
    if not held or list(held) != sorted(set(held)) or not 0 <= held[0] <= held[-1] < MAX_EXPERTS:
        raise UserError(f"held must be ascending ids in 0..{MAX_EXPERTS - 1}; found {list(held)}.")
    _check_block_m(block_m)


def check_grouped(call: GroupedCall) -> None:
    """Check the arguments of ``nested_grouped_linear``. Raises UserError."""
    rows_of_expert = sum(call.out_features)
    check_x(call.x, call.planes, None, rows_of_expert, call.in_features)
    _check_block_m(call.block_m)
    for name, tensor, wanted in (("pairs", call.pairs, (1,)), ("items", call.items, (2, 4))):
        right = tensor.dtype == torch.int32 and (tensor.ndim, *tensor.shape[1:]) == wanted and tensor.is_contiguous()
        if not right or tensor.device != call.x.device:
            raise UserError(
                f"{name} must be that of route_experts, int32 on {call.x.device}; found {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}."
            )
    if not call.out_features or any(rows % TILE or rows < TILE for rows in call.out_features):
        raise UserError(f"Rows of stacked experts must be multiples of {TILE}; found {list(call.out_features)}.")
    experts, rest = divmod(len(call.bits), len(call.out_features))
    if rest or not 1 <= experts <= MAX_EXPERTS:
        raise UserError(
            f"bits must have a number for each of the {len(call.out_features)} matrices of 1 to {MAX_EXPERTS} experts; found "
            f"{len(call.bits)}."
        )
    _check_weights(call, experts * rows_of_expert)


def _check_weights(call: GroupedCall, rows: int) -> None:
    """Check planes, scales, zero points and bit-widths. Raises UserError."""
    if len(call.scales) != 1 + len(call.scale_bits):
        raise UserError(
            f"{len(call.scales)} sets of scales were given; needed are the base set and those of {list(call.scale_bits)} bits."
        )
    fmt = call.format
    for scales in call.scales:
        if scales.dtype != fmt.scale_dtype or scales.stride() != call.scales[0].stride():
            raise UserError("All sets of scales must have one dtype and one layout.")
        check_layout(call.planes, scales, call.zeros, rows, call.in_features, fmt)
    for bits in sorted(set(call.bits)):
        fmt.check_bits(bits, call.planes.shape[0])


def _check_block_m(block_m: int) -> None:
    if block_m not in BLOCK_M:
        raise UserError(f"block_m must be one of {', '.join(map(str, BLOCK_M))}; found {block_m}.")


def route(experts: Tensor, held: Sequence[int], block_m: int) -> tuple[Tensor, Tensor]:
    """Operator ``route_experts``."""
    check_routing(experts, held, block_m)
    of_expert: dict[int, list[int]] = {expert: [] for expert in held}
    for pair, expert in enumerate(experts.flatten().tolist()):
        if expert in of_expert:
            of_expert[expert].append(pair)
    starts = itertools.accumulate(map(len, of_expert.values()), initial=0)
    items = [
        (place, start + first, min(block_m, len(own) - first), 0)
        for place, (own, start) in enumerate(zip(of_expert.values(), starts, strict=False))
        for first in range(0, len(own), block_m)
    ]
    ordered = list(itertools.chain.from_iterable(of_expert.values()))
    pairs = experts.new_full((experts.numel(),), -1, dtype=torch.int32)
    pairs[: len(ordered)] = pairs.new_tensor(ordered)
    table = pairs.new_zeros(max_items(len(pairs), len(held), block_m), 4)
    table[: len(items)] = pairs.new_tensor(items).view(-1, 4)
    return pairs, table


def grouped_linear(call: GroupedCall) -> Tensor:
    """Operator ``nested_grouped_linear``, an item at a time."""
    check_no_gradient(call.x, call.scales[0], None)
    check_grouped(call)
    per_row, ends = call.pairs_per_row, list(itertools.accumulate(call.out_features))
    y = call.x.new_zeros(len(call.pairs), ends[-1])
    for place, first, count, _ in call.items.tolist():
        own = call.pairs[first : first + count].long()
        for part, (end, rows) in enumerate(zip(ends, call.out_features, strict=True)):
            bits = call.bits[place * len(ends) + part]
            if count:
                weight = _matrix(call, place * ends[-1] + end - rows, rows, bits)
                y[own, end - rows : end] = torch_reference.linear(call.x[own // per_row], weight, None, bits)
    return y


def _matrix(call: GroupedCall, first: int, rows: int, bits: int) -> NestedPlanes:
    """Rows from ``first`` on of the stacked matrices, with the scales of ``bits`` bits."""
    block = slice(first // TILE, (first + rows) // TILE)
    return NestedPlanes(
        planes=call.planes[: call.format.planes_read(bits), block],  # later ones may not be in memory
        scales=call.scales_at(bits)[:, block],
        zeros=None if call.zeros is None else call.zeros[:, block],
        out_features=rows,
        in_features=call.in_features,
        format=call.format,
    )
