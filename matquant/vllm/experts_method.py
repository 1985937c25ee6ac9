"""Mixtures of experts in vLLM. Each matrix of each expert has its own bit-width.

On CUDA devices the experts of a step are computed together, in a launch for each bit-width, see ``grouped_experts``. Steps of
many tokens, and experts that the kernels do not support, are computed one expert at a time, for the tokens that are routed to
it. Where experts that the kernels do not support are captured into a CUDA graph, every expert is computed for all tokens, since
a loop cannot depend on the routing.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import vllm
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from matquant.errors import UserError
from matquant.inference.shard import WeightShard
from matquant.vllm.compat import OLDEST_WITH_EXPERTS, check_release
from matquant.vllm.cuda_graphs import graph_tokens
from matquant.vllm.grouped_experts import group_experts
from matquant.vllm.sharded_linear import ShardedNestedLinear, finish_loading

# Names of the matrices of an expert: gate and up in one matrix or in two, then the down projection.
_GATE_UP = (("gate_up_proj",), ("w13",), ("gate_proj", "up_proj"), ("w1", "w3"))
_DOWN = ("down_proj", "w2")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}
_NAME = re.compile(r"(\d+)\.(\w+)")

_library = torch.library.Library("matquant", "FRAGMENT")
_library.define("nested_experts(Tensor x, Tensor weights, Tensor experts, str layer) -> Tensor")


class NestedExpertsMethod(FusedMoEMethodBase):
    """Quantization method of the experts of one block.

    Args:
        prefix: vLLM's name of the layer of experts.
        gate_up: name of the matrix, or names of the two matrices, of gate and up.
        down: name of the down projection.
        make_shard: makes the shard of a nested layer from vLLM's name of it; returns None for a layer that is not quantized.
        is_dummy: True for ``load_format=dummy``.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        prefix: str,
        gate_up: tuple[str, ...],
        down: str,
        make_shard: Callable[[str, WeightShard], ShardedNestedLinear | None],
        is_dummy: bool = False,
    ) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.gate_up, self.down = prefix, gate_up, down
        self.make_shard, self.is_dummy = make_shard, is_dummy

    @classmethod
    def for_layer(
        cls,
        layer: RoutedExperts,
        prefix: str,
        names: Mapping[str, str],
        make_shard: Callable[[str, WeightShard], ShardedNestedLinear | None],
        is_dummy: bool = False,
    ) -> "NestedExpertsMethod | None":
        """Method of a layer of experts; None if no expert is nested.

        Args:
            names: nested layers by vLLM's names.

        Raises:
            UserError: only some matrices are nested, or the release of vLLM or the activation of the experts is not
                supported.
        """
        found = {m[2] for n in names if n.startswith(f"{prefix}.") and (m := _NAME.fullmatch(n[len(prefix) + 1 :]))}
        if not found:
            return None
        check_release(vllm.__version__, OLDEST_WITH_EXPERTS, " for mixtures of experts")
        gate_up = next((kinds for kinds in _GATE_UP if found.issuperset(kinds)), None)
        down = next((kind for kind in _DOWN if kind in found), None)
        if gate_up is None or down is None:
            raise UserError(
                f"{prefix}: only {sorted(found)} of the experts are quantized; vLLM needs all matrices or none. Quantize all."
            )
        if layer.activation.value not in _ACTIVATIONS or layer.moe_config.has_bias:
            raise UserError(
                f"{prefix}: experts with activation {layer.activation.value}{' and a bias' * layer.moe_config.has_bias} are "
                f"not supported; only those with {', '.join(_ACTIVATIONS)} and no bias are."
            )
        return cls(layer, prefix, gate_up, down, make_shard, is_dummy)

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
        gate_and_up = (held, (size * inner + held[0], size * inner + held[1]))
        gate_up = WeightShard(2 * size * inner, hidden_size, gate_and_up, (0, hidden_size))
        if len(self.gate_up) == 2:
            gate_up = WeightShard(size * inner, hidden_size, (held,), (0, hidden_size))
        down = WeightShard(hidden_size, size * inner, ((0, hidden_size),), held)
        experts = nn.ModuleDict()
        for index in range(layer.global_num_experts):
            if layer._map_global_expert_id_to_local_expert_id(index) == -1:
                continue
            linears = {kind: self._make_linear(index, kind, gate_up) for kind in self.gate_up}
            linears[self.down] = self._make_linear(index, self.down, down)
            experts[str(index)] = nn.ModuleDict(linears)
        layer.nested_experts = experts
        layer.grouped_experts = group_experts(
            dict(experts.items()),
            self.gate_up,
            self.down,
            layer.global_num_experts,
            graph_tokens(get_current_vllm_config().compilation_config),
        )
        # vLLM's own loader shards and stacks dense matrices.
        layer.load_weights = lambda weights: _load(layer, weights)

    def _make_linear(self, index: int, kind: str, shard: WeightShard) -> ShardedNestedLinear:
        name = f"{self.prefix}.{index}.{kind}"
        linear = self.make_shard(name, shard)
        if linear is None:
            raise UserError(f"{name} is not quantized, but other experts are; vLLM needs all or none. Quantize all.")
        return linear

    def process_weights_after_loading(self, layer: Any) -> None:
        linears = [linear for expert in layer.nested_experts.values() for linear in expert.values()]
        finish_loading(linears, self.is_dummy)

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
        out: Tensor = torch.ops.matquant.nested_experts.default(x, topk_weights, topk_ids, layer.layer_name)
        return out

    def compute(self, layer: RoutedExperts, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Compute the contribution of this device's experts: [tokens, hidden], in the dtype of ``x``.

        Args:
            x: hidden states [tokens, hidden].
            weights, experts: router weights and indices of each token's experts, [tokens, k].
        """
        grouped = layer.grouped_experts
        if x.is_cuda and grouped is not None and grouped.prefers(x, experts):
            activation = _ACTIVATIONS[layer.activation.value]
            together: Tensor = grouped(x, weights, experts, activation, layer.apply_router_weight_on_input)
            return together
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        result = torch.zeros_like(x)
        for index, expert in layer.nested_experts.items():
            weight = torch.where(experts == int(index), weights, 0).sum(-1, keepdim=True).to(x.dtype)  # (tokens, 1)
            if capturing:
                result += self._compute_expert(layer, expert, x, weight)
            elif len(tokens := weight[:, 0].nonzero()[:, 0]):
                result.index_add_(0, tokens, self._compute_expert(layer, expert, x[tokens], weight[tokens]))
        return result

    def _compute_expert(self, layer: RoutedExperts, expert: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight_input = layer.apply_router_weight_on_input
        inner = [expert[kind](x * weight if weight_input else x, None) for kind in self.gate_up]
        gate, up = inner if len(inner) == 2 else inner[0].chunk(2, -1)
        out: Tensor = expert[self.down](_ACTIVATIONS[layer.activation.value](gate) * up, None)
        return out if weight_input else out * weight


def _load(layer: RoutedExperts, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Load stored tensors ``INDEX.KIND.NAME``; tensors of experts on other devices are skipped."""
    for name, tensor in weights:
        index, kind, last = name.split(".", 2)
        if index in layer.nested_experts:
            layer.nested_experts[index][kind].load(last, tensor)
        yield name


def _nested_experts(x: Tensor, weights: Tensor, experts: Tensor, layer: str) -> Tensor:
    routed = get_forward_context().no_compile_layers[layer].routed_experts
    out: Tensor = routed.quant_method.compute(routed, x, weights, experts)
    return out


for _key in ("CPU", "CUDA"):
    _library.impl("nested_experts", _nested_experts, _key)
torch.library.register_fake(
    "matquant::nested_experts", lambda x, weights, experts, layer: torch.empty_like(x), lib=_library
)
