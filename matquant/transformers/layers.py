"""Nested layers on the meta device in a model, and the tensors that the checkpoint must hold for that model."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.formats.packed import LayerSpec, NestedSpec, TensorSpec
from matquant.inference import NestedLinear
from matquant.inference.experts import is_fused_experts, split_fused_experts
from matquant.inference.linear import scale_buffers
from matquant.inference.linear_modules import is_linear


class PackedLinear(NestedLinear):
    """Nested layer without extra state: the config of the checkpoint holds the meaning of its tensors.

    Attributes:
        is_loaded: set when ``from_pretrained`` has finished. Until then ``weight`` is a placeholder, since some
            architectures initialize the weight of a layer from the module around it.
    """

    is_loaded = False

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def weight(self) -> Tensor:
        """Weight, see ``NestedLinear.weight``; before the end of loading a tensor without values."""
        if self.is_loaded:
            return super().weight
        placeholder = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")
        setattr(placeholder, "_is_hf_initialized", True)  # noqa: B010  (an attribute of Transformers)
        return placeholder


def place_layers(model: Any, spec: NestedSpec) -> None:
    """Replace each layer of the checkpoint by a nested layer on the meta device.

    Fused experts are split into linear layers if any of them is nested.

    Args:
        model: model on the meta device.
        spec: description of the checkpoint; the planes of ``max_bits`` bits will be read.

    Raises:
        UserError: the model lacks a layer or has it in another size. Some layers may have been replaced then.
    """
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in spec.layers}  # X.experts of X.experts.3.down_proj
    for path, module in list(model.named_modules()):
        if path in owners and is_fused_experts(module):
            experts, _ = split_fused_experts(module, path)
            _replace(model, path, experts)
    for name, layer in spec.layers.items():
        dense = _find_linear(model, name, layer)
        _replace(model, name, _empty_layer(dense, layer, layer.plane_count(spec.max_bits)))


def dense_tensors(model: Any, spec: NestedSpec) -> dict[str, TensorSpec]:
    """Tensors of the model that are not part of its nested layers, by name."""
    own = {
        f"{name}.{buffer}"
        for name, layer in spec.layers.items()
        for buffer in ("planes", "zeros", *scale_buffers(layer.format, layer.plane_count(spec.max_bits)))
    }
    return {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in model.state_dict().items() if n not in own}


def optional_tensors(model: Any, stored: Collection[str], needed: Collection[str]) -> set[str]:
    """Needed tensors that may be missing: tied to a stored tensor, or computed by the architecture."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found = {one for pair in tied.items() for one in pair if any(name in stored for name in pair)}
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    return found | {name for name in needed if any(re.search(pattern, name) for pattern in patterns)}


def _find_linear(model: Any, name: str, layer: LayerSpec) -> Any:
    """Linear layer ``name`` of the model. Raises UserError if it is missing or has another size than in the checkpoint."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"The checkpoint has a nested layer {name}, but {type(model).__name__} has none of that name. Use the model that "
            "it was packed for."
        ) from None
    if not (is_linear(module) or isinstance(module, Conv1D)):
        raise UserError(f"{name} is a {type(module).__name__} in {type(model).__name__}, not a linear layer.")
    shape = tuple(module.weight.shape)
    found, wanted = shape[:: -1 if isinstance(module, Conv1D) else 1], (layer.out_features, layer.in_features)
    if found != wanted:
        raise UserError(f"{name} is {list(wanted)} in the checkpoint and {list(found)} in the model.")
    return module


def _empty_layer(dense: Any, layer: LayerSpec, num_planes: int) -> PackedLinear:
    """Nested layer on the meta device in place of a dense one."""
    with torch.device("meta"):
        nested = PackedLinear(
            layer.in_features,
            layer.out_features,
            format=layer.format,
            bias=dense.bias is not None,
            num_planes=num_planes,
            dtype=dense.weight.dtype,
        )
    nested.train(dense.training)
    return nested


def _replace(model: Any, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
