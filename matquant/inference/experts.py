"""Mixture of experts with a linear layer for each matrix of each expert.

Transformers stores the experts of a block as tensors of three dimensions, without linear layers. ``PerExpertLinears`` has
linear layers over the same storage, so that every matrix has a name, and a module that can be hooked and replaced.

On CUDA devices nested layers of all experts are computed together, in a launch for each bit-width: see ``expert_ops``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.inference.expert_ops import StackedExperts, route
from matquant.inference.kernel_families.moe import MOE_MAX_M
from matquant.inference.linear import NestedLinear
from matquant.inference.moe_launch import MAX_EXPERTS, prefers_grouped
from matquant.inference.stacked_layers import LayerStack


@dataclass(frozen=True, slots=True)
class SourceView:
    """Position of a layer's weight in the original model of Transformers.

    Attributes:
        name: full name of the parameter.
        expert: index in the first dimension; None for a parameter that is one matrix.
        transposed: True if stored as [in, out].
    """

    name: str
    expert: int | None = None
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """View of the weight [out, in] or bias [out] in the stored tensor."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.t() if self.transposed else part


class PerExpertLinears(nn.ModuleList):
    """Experts of one block, each a module with ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    Equivalent to the fused experts of Transformers, one expert at a time, or on a CUDA device all nested ones together. The
    outputs of a token's experts are summed in the order of the router, so that results do not depend on the scheduling of
    threads.

    Args:
        fused: module made by ``use_experts_implementation`` of Transformers; its storage is shared.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.first = "gate_up_proj" if fused.has_gate else "up_proj"
        self._fused = [fused]  # in a list, so that its parameters are not registered here as well
        for index in range(fused.num_experts):
            expert = nn.Module()
            for name in (self.first, "down_proj"):
                expert.add_module(name, _linear(fused, name, index))
            self.append(expert)
        self._stacks = {name: LayerStack() for name in (self.first, "down_proj")}
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Map hidden states [tokens, hidden] to [tokens, hidden].

        Args:
            routing: indices of each token's experts, then their weights, both [tokens, k].
            named: the same as keywords, whose names differ between architectures.
        """
        top_k_index, top_k_weights = (*routing, *named.values())
        if uses_kernels(hidden_states) and (stacks := self._stacked(hidden_states, top_k_index)) is not None:
            together: Tensor = self._forward_together(hidden_states, top_k_index, top_k_weights, *stacks)
            return together
        if is_capturing(hidden_states):
            raise UserError(
                "A CUDA graph is being captured, and these experts are computed one at a time, which reads the routing on the "
                "host. Graphs hold nested layers of one format without biases and hooks, in half precision, of up to "
                f"{MOE_MAX_M} tokens for an expert on average."
            )
        fused = self._fused[0]
        mixed = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])  # (tokens, k, hidden)
        expert: Any
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                inner = getattr(expert, self.first)(hidden_states[token])
                inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
                out = expert.down_proj(inner) * top_k_weights[token, place, None]
                mixed[token, place] = out.to(mixed.dtype)
        return mixed.sum(1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stacked(self, x: Tensor, top_k_index: Tensor) -> tuple[StackedExperts, StackedExperts] | None:
        """Stacks of both layers of all experts; None if the experts are to be computed one at a time.

        Raises:
            UserError: a CUDA graph is being captured, and the experts have not been run before.
        """
        layers = {name: [getattr(expert, name) for expert in self] for name in self._stacks}
        if (
            len(self) > MAX_EXPERTS
            or (torch.is_grad_enabled() and x.requires_grad)
            or not prefers_grouped(top_k_index.shape[0], top_k_index.shape[1], len(self))
            or not all(_can_be_stacked(layer) for kind in layers.values() for layer in kind)
        ):
            return None
        if is_capturing(x) and not all(self._stacks[name].is_ready(kind) for name, kind in layers.items()):
            raise UserError(
                "A CUDA graph is being captured, and the experts of this model have not been run yet: their tensors would have "
                "to be joined now. Run the model once at these bits and this batch size before the capture."
            )
        first, down = (self._stacks[name].of(kind) for name, kind in layers.items())
        if first is None or down is None or not (first.is_supported(x.dtype) and down.is_supported(x.dtype)):
            return None
        return first, down

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_together(
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, first: StackedExperts, down: StackedExperts
    ) -> Tensor:
        """Compute ``forward`` by grouped products."""
        fused, routing = self._fused[0], route(top_k_index, range(len(self)), len(self))
        inner = first.linear(x, routing, self._bits(self.first))  # (pairs, rows)
        inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
        out = down.linear(inner, routing, self._bits("down_proj")).view(*top_k_index.shape, -1)
        mixed: Tensor = (out * top_k_weights[:, :, None]).to(x.dtype).sum(1)
        return mixed

    def _bits(self, name: str) -> list[int]:
        """Bit-width of one layer of each expert in the current phase."""
        return [getattr(expert, name).phase_bits() for expert in self]

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, whose layers are stacked anew."""
        return {**self.__dict__, "_stacks": {name: LayerStack() for name in self._stacks}}


def uses_kernels(x: Tensor) -> bool:
    """True if the experts of these hidden states may be computed together."""
    return x.is_cuda and x.ndim == 2 and x.dtype in (torch.float16, torch.bfloat16)


def is_capturing(x: Tensor) -> bool:
    """True while a CUDA graph is captured on the device of ``x``."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _can_be_stacked(layer: nn.Module) -> bool:
    """True for a nested layer without a bias whose call is its product and nothing else: no hooks."""
    return (
        isinstance(layer, NestedLinear)
        and type(layer).forward is NestedLinear.forward
        and layer.bias is None
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def is_fused_experts(module: nn.Module) -> bool:
    """True if a module holds experts as tensors of three dimensions in a form that ``PerExpertLinears`` supports."""
    down = getattr(module, "down_proj", None)
    known = all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed", "_apply_gate"))
    plain = known and not getattr(module, "has_post_expert_norm", False)
    return plain and isinstance(down, nn.Parameter) and down.ndim == 3


def split_fused_experts(module: Any, path: str) -> tuple[PerExpertLinears, dict[str, SourceView]]:
    """Split fused experts into linear layers.

    Args:
        path: full name of the module.

    Returns:
        The module to use instead, and the position of its weights and biases in the original model, by full name.
    """
    experts = PerExpertLinears(module)
    origins = {}
    for index in range(module.num_experts):
        for name in (experts.first, "down_proj"):
            origins[f"{path}.{index}.{name}.weight"] = SourceView(f"{path}.{name}", index, module.is_transposed)
            if module.has_bias:
                origins[f"{path}.{index}.{name}.bias"] = SourceView(f"{path}.{name}_bias", index)
    return experts, origins


def _linear(fused: Any, name: str, index: int) -> nn.Linear:
    weight = SourceView(name, index, fused.is_transposed).view(getattr(fused, name).detach())
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.has_bias, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        layer.bias = nn.Parameter(getattr(fused, f"{name}_bias").detach()[index], requires_grad=False)
    return layer
