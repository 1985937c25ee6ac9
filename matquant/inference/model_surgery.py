"""Changes to whole models: replace linear layers by nested ones, and set their bit-widths."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matquant.errors import UserError
from matquant.formats.bit_choice import Bits, bits_by_layer
from matquant.formats.parent import TRANSFORM_KEY, Parent
from matquant.formats.planes import NestedPlanes
from matquant.inference.forward_phase import ForwardPhase, takes_tokens
from matquant.inference.fused_layers import FusedLayers
from matquant.inference.linear import NestedLinear
from matquant.inference.linear_modules import is_linear
from matquant.store.artifact import read_artifact

# Names of the layers of one module that get the same input.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("linear_x", "linear_y"),
)


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """Nested layers of a model by full dotted name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def set_bits(model: nn.Module, bits: Bits, prefill: Bits | None = None) -> dict[str, int]:
    """Set the bit-widths of the nested layers of a model.

    Args:
        bits: one bit-width for all layers, a bit-width by full layer name, or the file of an allocation. Layers that are not
            named keep theirs.
        prefill: bit-widths of calls of the model that read prompts, in the same form; see ``forward_phase``. Layers that it
            does not name, and all of them for None, use that of decoding.

    Returns:
        Bit-width of decoding of every nested layer, by name.

    Raises:
        UserError: a name is no nested layer, the planes of a layer do not hold its bit-width, or ``prefill`` differs for a
            layer that is in no model with ``input_ids``. Nothing has changed then.
    """
    layers = nested_layers(model)
    if not layers:
        raise UserError("The model has no nested layers whose bits could be set. Call replace_linears first.")
    decode_bits = bits_by_layer(bits, layers)
    prefill_bits = {} if prefill is None else bits_by_layer(prefill, layers)
    for by_layer in (decode_bits, prefill_bits):
        for name, value in by_layer.items():
            layers[name].check_bits(value, name)
    follow_phase(model)
    choices = {}
    for name in decode_bits.keys() | prefill_bits.keys():
        decode = decode_bits.get(name, layers[name].decode_bits)
        choices[name] = (decode, prefill_bits.get(name, decode))
        if decode != choices[name][1] and layers[name].phase is None:
            raise UserError(
                f"prefill differs from bits, but no module of {type(model).__name__} around {name} takes input_ids, so "
                "that the phase of a call would be unknown. Call set_bits with the whole model, or set one bit-width."
            )
    for name, (decode, prompt) in choices.items():
        layers[name].set_bits(decode, prompt)
    return {name: layer.decode_bits for name, layer in layers.items()}


def follow_phase(model: nn.Module) -> None:
    """Connect nested layers with the phase of the model's forward pass, so that it decides their bit-width. Idempotent.

    Args:
        model: a whole model. Hooks are added to it and to those of its parts that take ``input_ids``.
    """
    layers = {layer for layer in nested_layers(model).values() if layer.phase is None}
    phase = ForwardPhase()
    for depth, module in enumerate(filter(takes_tokens, model.modules())):  # outer modules come first
        if inner := layers.intersection(module.modules()):
            phase.follow(module, depth)
            for layer in inner:
                layer.phase = phase


def fuse_layers(model: nn.Module, device_types: Iterable[str] = ("cuda",)) -> list[FusedLayers]:
    """Multiply nested layers that share their input by one launch, see ``fused_layers``. Idempotent.

    Layers are fused if they stand in one module under names of ``SHARED_INPUTS``. Those whose formats or input features differ
    stay separate, and all on devices of other types. Layers that are fused for other types of devices are fused anew.

    Args:
        model: a model with its nested layers on their devices; it may be moved later.

    Returns:
        The fused layers that are new.
    """
    types, found = frozenset(device_types), []
    for module in model.modules():
        for names in SHARED_INPUTS:
            layers: dict[Any, list[NestedLinear]] = {}
            for layer in (module._modules.get(name) for name in names):
                if isinstance(layer, NestedLinear) and (layer.fused is None or layer.fused.device_types != types):
                    layers.setdefault((layer.format, layer.in_features), []).append(layer)
            found += [FusedLayers(members, types) for members in layers.values() if len(members) > 1]
    return found


def replace_linears(
    model: nn.Module, parent: Parent | Path | str, max_bits: int | None = None
) -> dict[str, NestedLinear]:
    """Replace the linear layers that a parent holds by nested layers with the parent's weights, in place.

    Works layer by layer: the dense weight of one layer is freed before the next is packed. Planes go to the device of the
    dense weight, or to the CPU if that is the meta device. A bias stays unchanged.

    Args:
        model: the model that the parent was made from, with or without weights.
        parent: open parent, or its folder, ``parent.path`` in the ``results.json`` of a run.
        max_bits: largest bit-width to keep the planes of; None keeps all.

    Returns:
        The new layers by name, at their largest bit-width.

    Raises:
        UserError: the folder is no parent or damaged, or the model lacks a layer of the parent, has it in another shape, or
            not as a linear layer. Nothing has changed then.
    """
    if not isinstance(parent, Parent):
        parent = _open_parent(Path(parent))
    _check_compatible(model, parent)
    layers = {}
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            dense: Any = model.get_submodule(name)
            device = dense.weight.device
            planes = NestedPlanes.pack(weight, max_bits).to("cpu" if device.type == "meta" else device)
            layers[name] = NestedLinear.from_planes(planes, dense.bias, dtype=dense.weight.dtype).train(dense.training)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layers[name])
            del dense
    follow_phase(model)
    fuse_layers(model)
    return layers


def _open_parent(folder: Path) -> Parent:
    try:
        return Parent(read_artifact(folder))
    except (UserError, KeyError) as error:
        raise UserError(f"{folder} is no parent, or a damaged one: {error}.") from error


def _check_compatible(model: nn.Module, parent: Parent) -> None:
    """Check that a model can hold the layers of a parent. Raises UserError.

    ``parent.artifact.about`` is the manifest of the parent: conditions that concern the whole model belong here.
    """
    _check_transform(model, parent.transform)
    for block in parent.blocks:
        layers: Mapping[str, Mapping[str, Any]] = block["layers"]
        for name, about in layers.items():
            _check_linear(model, name, tuple(about["shape"]))


def _check_transform(model: nn.Module, transform: Mapping[str, Any] | None) -> None:
    """Raise UserError unless the model's weights passed the transform of the parent's."""
    found: Any = getattr(getattr(model, "config", None), TRANSFORM_KEY, None)
    if found == transform:
        return
    if transform is None:
        raise UserError(
            f"The model's weights passed the transform {found['name']}, and the parent was made from original weights. "
            "Load the original model."
        )
    if found is None:
        raise UserError(
            f"The parent was made from weights that passed the transform {transform['name']}, and this model has its "
            "original weights. Call matquant.transforms.registry.apply_transform(model, parent.transform) first, or load a "
            "packed folder."
        )
    raise UserError(
        f"The model's weights passed the transform {dict(found)}, those of the parent {dict(transform)}. Load the "
        "original model, and call matquant.transforms.registry.apply_transform(model, parent.transform)."
    )


def _check_linear(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Check that the module ``name`` is a linear layer with a weight of this shape [out, in]. Raises UserError."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise UserError(
            f"The parent has a layer {name}, but this model has no layer of that name. Use the model that the parent was made "
            "from."
        ) from error
    if is_linear(module):
        found = tuple(module.weight.shape)
    elif type(module).__name__ == "Conv1D":  # linear layer of Transformers with a weight [in, out]
        found = tuple(module.weight.shape[::-1])
    else:
        raise UserError(f"{name} is a {type(module).__name__}, not a linear layer, and cannot be replaced.")
    if found != shape:
        raise UserError(
            f"{name} is {found} in the model and {shape} in the parent. Use the model that the parent was made from."
        )
    bias = module.bias
    if isinstance(bias, torch.Tensor) and bias.is_meta:
        raise UserError(
            f"The bias of {name} has no values (it is on the meta device). Load the unquantized tensors first."
        )
