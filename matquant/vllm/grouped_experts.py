"""Experts of one block of vLLM in one launch for each bit-width: matrices of one kind become ranges of shared tensors.

Works without vLLM. The routing is read on the device, so that steps that are captured into a CUDA graph compute no expert
without tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matquant.formats.tile_layout import TILE
from matquant.inference.expert_ops import StackedExperts, route
from matquant.inference.linear import scale_buffers
from matquant.inference.moe_launch import MAX_EXPERTS, prefers_grouped
from matquant.vllm import vllm_ops
from matquant.vllm.fused_linears import FusedLinears, fuse
from matquant.vllm.sharded_linear import ShardedNestedLinear


class GroupedExperts(nn.Module):
    """Experts on this device, before they are loaded. Make it by ``group_experts``.

    Args:
        gate_up, down: matrices of all experts, expert by expert.
        step_bits: their bit-widths, int64 [matrices, 3], see ``vllm_ops.new_step_bits``; the matrices hold its rows.
        held: ascending ids of the experts on this device.
        total: number of experts on all devices.
        graph_tokens: largest number of tokens of a step that is captured into a CUDA graph.
    """

    def __init__(
        self,
        gate_up: FusedLinears,
        down: FusedLinears,
        step_bits: Sequence[Tensor],
        held: Sequence[int],
        total: int,
        graph_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.held, self.total, self.graph_tokens = list(held), total, graph_tokens
        self._step_bits = list(step_bits)

    def prefers(self, x: Tensor, experts: Tensor) -> bool:
        """Return True if the experts of a step are to be computed together: few tokens, or as many as a CUDA graph has.

        The answer is the same while a graph is captured and before, when the kernels are loaded.

        Args:
            x: hidden states [tokens, hidden].
            experts: experts of each token, [tokens, k].
        """
        tokens, top_k = experts.shape
        few = tokens <= self.graph_tokens or prefers_grouped(tokens, top_k, self.total)
        return few and all(self._stack(kind).is_supported(x.dtype) for kind in (self.gate_up, self.down))

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        activation: Callable[[Tensor], Tensor],
        weight_input: bool = False,
    ) -> Tensor:
        """Compute the contribution of the experts on this device: [tokens, hidden], in the dtype of ``x``.

        Args:
            x: hidden states [tokens, hidden].
            weights, experts: router weights and ids of each token's experts, [tokens, k].
            activation: of the gate.
            weight_input: multiply the inputs of an expert by the router weights, instead of its outputs.
        """
        tokens, top_k = experts.shape
        routing, weight = route(experts, self.held, self.total), weights.to(x.dtype)[:, :, None]  # (tokens, k, 1)
        if weight_input:
            x = (x[:, None] * weight).flatten(0, 1)  # (pairs, hidden)
        bits = [vllm_ops.all_current_bits(step_bits) for step_bits in self._step_bits]
        inner = self._stack(self.gate_up).linear(x, routing, bits[0])
        gate, up = inner.chunk(2, -1)
        out = self._stack(self.down).linear(activation(gate) * up, routing, bits[1]).view(tokens, top_k, -1)
        mixed: Tensor = (out if weight_input else out * weight).sum(1)
        return mixed

    def _stack(self, fused: FusedLinears) -> StackedExperts:
        return StackedExperts(
            planes=fused.planes,
            scales=[fused.get_buffer(name) for name in scale_buffers(fused.format, len(fused.planes))],
            scale_bits=fused.scale_bits,
            zeros=fused.zeros,
            out_features=fused.rows[: len(fused.rows) // len(self.held)],
            in_features=fused.columns,
            format=fused.format,
        )


def group_experts(
    experts: Mapping[str, Any], gate_up: Sequence[str], down: str, total: int, graph_tokens: int = 0
) -> GroupedExperts | None:
    """Group experts, before they are loaded. Their tensors and bit-widths become parts of shared ones.

    Args:
        experts: mappings or modules that hold each ``ShardedNestedLinear`` by kind, by id of the expert in ascending order.
        gate_up, down: kinds of the first matrices and of the last one.
        total, graph_tokens: see ``GroupedExperts``.

    Returns:
        None if they stay separate: several formats, rows beside whole tiles of 64 on this device, or a single expert.
    """
    kinds = [[expert[kind] for expert in experts.values() for kind in names] for names in (tuple(gate_up), (down,))]
    matrices = [matrix for kind in kinds for matrix in kind]
    if total > MAX_EXPERTS or any(matrix.shard.shape[0] % TILE for matrix in matrices):
        return None
    step_bits = [_join_step_bits(kind) for kind in kinds]
    first, last = (fuse(kind) for kind in kinds)
    if first is None or last is None:
        return None
    return GroupedExperts(first, last, step_bits, [int(index) for index in experts], total, graph_tokens)


def _join_step_bits(matrices: Sequence[ShardedNestedLinear]) -> Tensor:
    """Bit-widths of all matrices in one tensor; each matrix keeps its row."""
    joined = torch.stack([matrix.step_bits for matrix in matrices])
    for matrix, row in zip(matrices, joined, strict=True):
        matrix.step_bits = row
    return joined
