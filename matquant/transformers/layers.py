"""Nested layers without values in a model without values, and what its checkpoint has to hold."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.formats.packed import LayerSpec, NestedSpec, TensorSpec
from matquant.inference import NestedLinear
from matquant.inference.experts import is_fused, separate

_BUFFERS = ("planes", "scales", "zeros")


class PackedLinear(NestedLinear):
    """A nested layer whose state is its tensors alone: what they mean stands in the checkpoint's config."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def place_layers(model: Any, spec: NestedSpec) -> None:
    """Put a nested layer, on the meta device, in the place of each layer that the checkpoint has nested.

    Experts that are one tensor become layers of their own where any of them is nested.

    Args:
        model: on the meta device.
        spec: whose ``max_bits`` planes are to be read.

    Raises:
        UserError: the model has no such layer, or one of another size; some may be replaced already then.
    """
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in spec.layers}  # X.experts of X.experts.3.down_proj
    for path, module in list(model.named_modules()):
        if path in owners and is_fused(module):
            experts, _ = separate(module, path)
            _replace(model, path, experts)
    for name, layer in spec.layers.items():
        _replace(model, name, _nested(_linear(model, name, layer), layer, layer.planes(spec.max_bits)))
        # Some architectures begin a layer's weight from the module around it, which would look for that weight in vain.
        around = model.get_submodule(name.rpartition(".")[0])
        if not {**around._parameters, **around._buffers}:
            around._is_hf_initialized = True


def dense_tensors(model: Any, spec: NestedSpec) -> dict[str, TensorSpec]:
    """What the model needs beside its nested layers, by name."""
    own = {f"{name}.{buffer}" for name in spec.layers for buffer in _BUFFERS}
    return {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in model.state_dict().items() if n not in own}


def dispensable(model: Any, stored: Collection[str], needed: Collection[str]) -> set[str]:
    """Needed tensors that may be missing: those tied to one that is there, and those that the architecture computes."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found = {one for pair in tied.items() for one in pair if any(name in stored for name in pair)}
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    return found | {name for name in needed if any(re.search(pattern, name) for pattern in patterns)}


def _linear(model: Any, name: str, layer: LayerSpec) -> Any:
    """The layer of the model, checked against the checkpoint."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"The checkpoint has a nested layer {name}, and {type(model).__name__} has none of that name. Was it packed "
            "for another model?"
        ) from None
    if not isinstance(module, nn.Linear | Conv1D):
        raise UserError(f"{name} is a {type(module).__name__} in {type(model).__name__}, not a linear layer.")
    shape = tuple(module.weight.shape)
    found, wanted = shape[:: -1 if isinstance(module, Conv1D) else 1], (layer.out_features, layer.in_features)
    if found != wanted:
        raise UserError(f"{name} is {list(wanted)} in the checkpoint and {list(found)} in the model.")
    return module


def _nested(dense: Any, layer: LayerSpec, planes: int) -> PackedLinear:
    with torch.device("meta"):
        made = PackedLinear(
            layer.in_features,
            layer.out_features,
            format=layer.format,
            bias=dense.bias is not None,
            planes=planes,
            dtype=dense.weight.dtype,
        )
    made.train(dense.training)
    return made


def _replace(model: Any, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
