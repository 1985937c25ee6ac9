"""Discovery of a model's decoder blocks and their linear layers in the module tree, independent of names."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.inference.experts import SourceView, is_fused_experts, split_fused_experts
from matquant.inference.linear_modules import is_linear


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks, which may be of several classes (attention and Mamba, for example).

    Candidates are lists of modules with linear layers, without lists inside such a list (experts, adapters). Of several,
    those of the text model count (not of a vision or audio encoder), of them those in its decoder, of them those with as
    many modules as the config has hidden layers, and of them the longest.

    Returns:
        Full name of the list, and the list.

    Raises:
        UserError: the model has no such list.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _has_linear(module):
            found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList of modules with linear layers in "
            "them). This architecture is not supported."
        )
    config = _text_config(model)
    in_decoder = {id(module) for module in _decoder(model).modules()}
    names = list(found)
    for counts in (
        lambda name: type(_owner_config(model, name)) is type(config),
        lambda name: id(found[name]) in in_decoder,
        lambda name: len(found[name]) == getattr(config, "num_hidden_layers", None),
    ):
        names = [name for name in names if counts(name)] or names
    name = max(names, key=lambda name: len(found[name]))
    return name, found[name]


def _text_config(model: Any) -> Any:
    """Config of the text model inside a model; None for a module without config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _owner_config(model: nn.Module, name: str) -> Any:
    """Config of the innermost model of Transformers around a module."""
    configs = [getattr(model, "config", None)]
    module = model
    for part in name.split("."):
        module = getattr(module, part)
        configs += [module.config] if isinstance(module, PreTrainedModel) else []
    return configs[-1]


def _decoder(model: Any) -> nn.Module:
    """Decoder of a model by ``get_decoder`` of Transformers; else the model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model


def _has_linear(modules: nn.ModuleList) -> bool:
    return any(is_linear(inner) or isinstance(inner, Conv1D) or is_fused_experts(inner) for inner in modules.modules())


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
