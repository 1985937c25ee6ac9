"""Discovery of a model's decoder blocks and their linear layers in the module tree, independent of names."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.inference.experts import SourceView, is_fused_experts, split_fused_experts


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the longest list of modules of one class with linear layers, leaving out lists inside such a list (experts).

    Returns:
        Full name of the list, and the list.

    Raises:
        UserError: the model has no such list.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_block_list(module):
            found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList of modules of one class with "
            "linear layers in them). This architecture is not supported."
        )
    return max(found.items(), key=lambda item: len(item[1]))


def _is_block_list(modules: nn.ModuleList) -> bool:
    return len({type(m) for m in modules}) == 1 and all(
        any(isinstance(inner, nn.Linear | Conv1D) or is_fused_experts(inner) for inner in module.modules())
        for module in modules
    )


def make_linear(block: nn.Module, path: str) -> dict[str, SourceView]:
    """Replace ``Conv1D`` and fused experts of a block by ``nn.Linear`` on the same storage.

    ``Conv1D`` (GPT-2) stores [in, out], fused experts are one tensor of three dimensions.

    Args:
        block: changed in place.
        path: full name of the block.

    Returns:
        Location of each weight with a new name or shape in the original model, by full name.
    """
    source_views: dict[str, SourceView] = {}
    for inner, module in list(block.named_modules(prefix=path)):
        for name, child in list(module.named_children()):
            full = f"{inner}.{name}"
            if isinstance(child, Conv1D):
                setattr(module, name, _from_conv1d(child))
                source_views[f"{full}.weight"] = SourceView(f"{full}.weight", transposed=True)
            elif is_fused_experts(child):
                experts, found = split_fused_experts(child, full)
                setattr(module, name, experts)
                source_views |= found
    return source_views


def _from_conv1d(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)
