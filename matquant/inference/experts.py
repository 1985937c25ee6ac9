"""Mixtures of experts: from one tensor for all experts to a linear layer for each matrix of each expert.

Transformers keeps the experts of a block as tensors of three dimensions and has no linear layers there. Here every expert
gets linear layers over the same storage, so that each has a name, inputs that can be watched, and a weight that can be lent.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class SourceView:
    """Where a layer's weight lies in the model as Transformers makes it.

    Attributes:
        name: of the parameter.
        expert: its index in the first dimension; None for a parameter that is one matrix.
        transposed: stored as [in, out].
    """

    name: str
    expert: int | None = None
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The weight [out, in] (or the bias [out]) in the stored tensor."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.t() if self.transposed else part


class Experts(nn.ModuleList):
    """The experts of one block, each a module with ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.

    It computes what the experts of Transformers compute, an expert at a time, and adds a token's experts up in the order in
    which the router gave them, so that results do not depend on the order of threads.
    """

    def __init__(self, fused: Any) -> None:
        """Take the place of a module that Transformers' ``use_experts_implementation`` made."""
        super().__init__()
        self.first = "gate_up_proj" if fused.has_gate else "up_proj"
        self._fused = [fused]  # in a list, so that its parameters are not registered here as well
        for index in range(fused.num_experts):
            expert = nn.Module()
            for name in (self.first, "down_proj"):
                expert.add_module(name, _linear(fused, name, index))
            self.append(expert)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """[tokens, hidden] from [tokens, hidden]; ``routing`` is each token's experts and their weights, [tokens, k]."""
        top_k_index, top_k_weights = (*routing, *named.values())  # architectures have several names for them
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


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts as tensors of three dimensions in the way that ``Experts`` knows."""
    down = getattr(module, "down_proj", None)
    known = all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed", "_apply_gate"))
    plain = known and not getattr(module, "has_post_expert_norm", False)
    return plain and isinstance(down, nn.Parameter) and down.ndim == 3


def separate(module: Any, path: str) -> tuple[Experts, dict[str, SourceView]]:
    """The experts one by one, and the origins of their weights and biases by full name; ``path`` is the module's."""
    experts = Experts(module)
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
