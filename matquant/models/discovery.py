"""Finds the decoder blocks of a model and the linear layers in them, from the module tree and not from names."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.inference.experts import SourceView, is_fused_experts, split_fused_experts


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of like modules with linear layers; lists inside such a list (experts) do not count.

    Returns:
        Its full name, and the list.

    Raises:
        UserError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module):
            found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList of modules of one class with "
            "linear layers in them). This architecture is not supported."
        )
    return max(found.items(), key=lambda item: len(item[1]))


def _is_stack(modules: nn.ModuleList) -> bool:
    return len({type(m) for m in modules}) == 1 and all(
        any(isinstance(inner, nn.Linear | Conv1D) or is_fused_experts(inner) for inner in module.modules())
        for module in modules
    )


def make_linear(block: nn.Module, path: str) -> dict[str, SourceView]:
    """Put linear layers over the same storage in the place of what holds its matrices otherwise.

    That is ``Conv1D``, which stores [in, out] (GPT-2), and experts that are one tensor.

    Args:
        block: changed in place.
        path: its full name.

    Returns:
        Where the weights that have a new name or shape lie in the model as it was, by full name.
    """
    origins: dict[str, SourceView] = {}
    for inner, module in list(block.named_modules(prefix=path)):
        for name, child in list(module.named_children()):
            full = f"{inner}.{name}"
            if isinstance(child, Conv1D):
                setattr(module, name, _from_conv1d(child))
                origins[f"{full}.weight"] = SourceView(f"{full}.weight", transposed=True)
            elif is_fused_experts(child):
                experts, found = split_fused_experts(child, full)
                setattr(module, name, experts)
                origins |= found
    return origins


def _from_conv1d(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)
