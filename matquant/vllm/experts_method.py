"""Mixtures of experts in vLLM: each expert's matrices stay parts of their own, with a width each.

Steps that are captured into a CUDA graph compute every expert for all tokens, since a graph cannot depend on the routing.
All other steps compute an expert for the tokens that the router sent to it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from matquant.errors import UserError
from matquant.inference.shard import WeightShard
from matquant.vllm.sharded_linear import ShardedNestedLinear, check_complete

# What the matrices of an expert are called: both in one, or gate and up apart; then the one that leads back.
_FIRST = (("gate_up_proj",), ("w13",), ("gate_proj", "up_proj"), ("w1", "w3"))
_LAST = ("down_proj", "w2")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}
_NAME = re.compile(r"(\d+)\.(\w+)")

_library = torch.library.Library("matquant", "FRAGMENT")
_library.define("nested_experts(Tensor x, Tensor weights, Tensor experts, str layer) -> Tensor")


class NestedExpertsMethod(FusedMoEMethodBase):
    """The experts of one block.

    Args:
        first, last: what their matrices are called, of ``_FIRST`` and ``_LAST``.
        make: a part of a layer, given vLLM's name for it and the cut.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        prefix: str,
        first: tuple[str, ...],
        last: str,
        make: Callable[[str, WeightShard], ShardedNestedLinear | None],
    ) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.first, self.last, self.make = prefix, first, last, make

    @classmethod
    def of(
        cls,
        layer: RoutedExperts,
        prefix: str,
        names: Mapping[str, str],
        make: Callable[[str, WeightShard], ShardedNestedLinear | None],
    ) -> "NestedExpertsMethod | None":
        """The method of a layer of experts; None when none of them is nested.

        Args:
            prefix: vLLM's name of the layer.
            names: the nested layers by vLLM's names.

        Raises:
            UserError: some matrices are nested and some not, or the experts' activation is not known.
        """
        found = {m[2] for n in names if n.startswith(f"{prefix}.") and (m := _NAME.fullmatch(n[len(prefix) + 1 :]))}
        if not found:
            return None
        first = next((kinds for kinds in _FIRST if found.issuperset(kinds)), None)
        last = next((kind for kind in _LAST if kind in found), None)
        if first is None or last is None:
            raise UserError(f"{prefix}: only {sorted(found)} of the experts are quantized; vLLM needs all or none.")
        if layer.activation.value not in _ACTIVATIONS or layer.moe_config.has_bias:
            raise UserError(
                f"{prefix}: experts with {layer.activation.value} as activation{' and a bias' * layer.moe_config.has_bias} "
                f"are not known here, only those with {', '.join(_ACTIVATIONS)} and no bias."
            )
        return cls(layer, prefix, first, last, make)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rank, size = self.moe.tp_rank, self.moe.tp_size
        inner = intermediate_size_per_partition
        held = (rank * inner, (rank + 1) * inner)
        both = (held, (size * inner + held[0], size * inner + held[1]))
        first = WeightShard(2 * size * inner, hidden_size, both, (0, hidden_size))
        if len(self.first) == 2:
            first = WeightShard(size * inner, hidden_size, (held,), (0, hidden_size))
        last = WeightShard(hidden_size, size * inner, ((0, hidden_size),), held)
        experts = nn.ModuleDict()
        for index in range(layer.global_num_experts):
            if layer._map_global_expert_id_to_local_expert_id(index) == -1:
                continue
            kinds = {kind: self._part(index, kind, first) for kind in self.first} | {
                self.last: self._part(index, self.last, last)
            }
            experts[str(index)] = nn.ModuleDict(kinds)
        layer.nested_experts = experts
        # vLLM's own loader would cut and stack dense matrices.
        layer.load_weights = lambda weights: _load(layer, weights)

    def _part(self, index: int, kind: str, cut: WeightShard) -> ShardedNestedLinear:
        part = self.make(f"{self.prefix}.{index}.{kind}", cut)
        if part is None:
            raise UserError(
                f"{self.prefix}.{index}.{kind} is not quantized and other experts are; vLLM needs all or none."
            )
        return part

    def process_weights_after_loading(self, layer: Any) -> None:
        check_complete([part for expert in layer.nested_experts.values() for part in expert.values()])

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return torch.ops.matquant.nested_experts.default(x, topk_weights, topk_ids, layer.layer_name)

    def compute(self, layer: RoutedExperts, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """What the experts on this device add to each token: [tokens, hidden], of the dtype of ``x``.

        Args:
            x: [tokens, hidden].
            weights, experts: of the routing, [tokens, k].
        """
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        result = torch.zeros_like(x)
        for index, expert in layer.nested_experts.items():
            share = torch.where(experts == int(index), weights, 0).sum(-1, keepdim=True).to(x.dtype)  # (tokens, 1)
            if capturing:
                result += self._expert(layer, expert, x, share)
            elif len(tokens := share[:, 0].nonzero()[:, 0]):
                result.index_add_(0, tokens, self._expert(layer, expert, x[tokens], share[tokens]))
        return result

    def _expert(self, layer: RoutedExperts, expert: Any, x: Tensor, share: Tensor) -> Tensor:
        before = layer.apply_router_weight_on_input
        inner = [expert[kind](x * share if before else x, None) for kind in self.first]
        gate, up = inner if len(inner) == 2 else inner[0].chunk(2, -1)
        out = expert[self.last](_ACTIVATIONS[layer.activation.value](gate) * up, None)
        return out if before else out * share


def _load(layer: RoutedExperts, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Hand stored tensors ``INDEX.KIND.NAME`` to their parts; those of experts on other devices are passed over."""
    for name, tensor in weights:
        index, kind, last = name.split(".", 2)
        if index in layer.nested_experts:
            layer.nested_experts[index][kind].load(last, tensor)
        yield name


def _nested_experts(x: Tensor, weights: Tensor, experts: Tensor, layer: str) -> Tensor:
    routed = get_forward_context().no_compile_layers[layer].routed_experts
    return routed.quant_method.compute(routed, x, weights, experts)


for _key in ("CPU", "CUDA"):
    _library.impl("nested_experts", _nested_experts, _key)
torch.library.register_fake(
    "matquant::nested_experts", lambda x, weights, experts, layer: torch.empty_like(x), lib=_library
)
