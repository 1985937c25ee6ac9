"""Operators ``torch.ops.matquant.route_experts`` and ``torch.ops.matquant.nested_grouped_linear``, for mixtures of experts.

    route_experts(experts, held, block_m) -> pairs, items
    nested_grouped_linear(x, pairs, items, planes, scales, scale_bits, zeros, bits, out_features, in_features, block_m,
                          group_size, master_bits, slicing, offset, stretch) -> y

A *pair* is a token with one of its experts: pair t * k + j is token t with its j-th expert. ``route_experts`` sorts the pairs
by expert, and cuts those of an expert into items of at most ``block_m`` pairs. ``nested_grouped_linear`` multiplies the row of
``x`` of each pair with the matrix of its expert, at a bit-width of its own for each expert and each range of rows.

The tensors of all experts are stacked along the row tiles, expert by expert. On CUDA devices the routing is read on the device,
so that a captured CUDA graph holds for every routing, and weights of experts without pairs are not read. Elsewhere, and for
formats that the kernels do not support, plain torch computes the same. Both record no gradients.

Raises:
    UserError: tensors or sizes that do not fit together, or a bit-width that the planes do not hold.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matquant.formats.nested import WeightFormat
from matquant.inference import cuda_experts, expert_reference
from matquant.inference.expert_reference import GroupedCall
from matquant.inference.moe_launch import choose_block_m, max_items

_library = torch.library.Library("matquant", "FRAGMENT")
_library.define("route_experts(Tensor experts, int[] held, int block_m) -> (Tensor, Tensor)")
_library.define(
    "nested_grouped_linear(Tensor x, Tensor pairs, Tensor items, Tensor planes, Tensor[] scales, int[] scale_bits, "
    "Tensor? zeros, int[] bits, int[] out_features, int in_features, int block_m, int group_size, int master_bits, "
    "str slicing, float offset, float stretch) -> Tensor"
)


class Routing(NamedTuple):
    """Pairs of tokens and experts, for one or more products.

    Attributes:
        pairs: int32 [tokens * k], pairs in the order of their experts; those of experts that are not here come last, as -1 or
            as any number.
        items: int32 [n, 4]: place of the expert among those on this device, first entry of ``pairs``, number of pairs (0 for
            an unused item), 0.
        block_m: largest number of pairs of an item.
    """

    pairs: Tensor
    items: Tensor
    block_m: int


def route(experts: Tensor, held: Sequence[int], total: int) -> Routing:
    """Sort pairs by expert.

    Args:
        experts: int32 or int64 [tokens, k], the experts of each token. Ids that are not in ``held`` have no products.
        held: ascending ids of the experts on this device.
        total: number of experts on all devices.
    """
    block_m = choose_block_m(experts.shape[0], experts.shape[1], total)
    pairs, items = torch.ops.matquant.route_experts.default(experts, list(held), block_m)
    return Routing(pairs, items, block_m)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StackedExperts:
    """Matrices of all experts on this device that share an input, in the layout of ``formats.tile_layout``.

    Attributes:
        planes: int32 [planes, experts * row tiles of an expert, column tiles, 32, 4].
        scales: sets of scales, the base set first, then those of ``scale_bits``.
        scale_bits: bit-widths with scales of their own.
        zeros: zero points, or None.
        out_features: rows of each matrix of an expert, such as gate and up; multiples of 64.
        format: of the codes.
    """

    planes: Tensor
    scales: Sequence[Tensor]
    scale_bits: Sequence[int]
    zeros: Tensor | None
    out_features: Sequence[int]
    in_features: int
    format: WeightFormat

    def linear(self, x: Tensor, routing: Routing, bits: Sequence[int]) -> Tensor:
        """Products of all pairs: [pairs, rows of an expert], 0 for pairs whose expert is not on this device.

        Args:
            x: a row for each pair, or for each token: [pairs, in_features] or [tokens, in_features].
            bits: bit-widths of the matrices, expert by expert.
        """
        y: Tensor = torch.ops.matquant.nested_grouped_linear.default(
            x,
            routing.pairs,
            routing.items,
            self.planes,
            list(self.scales),
            list(self.scale_bits),
            self.zeros,
            list(bits),
            list(self.out_features),
            self.in_features,
            routing.block_m,
            *self.format.op_args,
        )
        return y

    def is_supported(self, dtype: torch.dtype) -> bool:
        """Return True if the CUDA kernels support the format, the size and activations of a dtype."""
        return cuda_experts.is_supported(self.out_features, self.in_features, self.format, dtype)


def _grouped(*arguments: Any) -> Tensor:
    return expert_reference.grouped_linear(GroupedCall(*arguments))


def _grouped_cuda(*arguments: Any) -> Tensor:
    return cuda_experts.grouped_linear(GroupedCall(*arguments))


def _fake_route(experts: Tensor, held: Sequence[int], block_m: int) -> tuple[Tensor, Tensor]:
    expert_reference.check_routing(experts, held, block_m)
    count = experts.shape[0] * experts.shape[1]
    pairs = experts.new_empty(count, dtype=torch.int32)
    return pairs, experts.new_empty(max_items(count, len(held), block_m), 4, dtype=torch.int32)


def _fake_grouped(*arguments: Any) -> Tensor:
    call = GroupedCall(*arguments)
    expert_reference.check_grouped(call)
    return call.x.new_empty(call.pairs.shape[0], sum(call.out_features))


_library.impl("route_experts", expert_reference.route, "CPU")
_library.impl("route_experts", cuda_experts.route, "CUDA")
_library.impl("nested_grouped_linear", _grouped, "CPU")
_library.impl("nested_grouped_linear", _grouped_cuda, "CUDA")
torch.library.register_fake("matquant::route_experts", _fake_route, lib=_library)
torch.library.register_fake("matquant::nested_grouped_linear", _fake_grouped, lib=_library)
