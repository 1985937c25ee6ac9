"""Whole models: swapping linear layers for nested ones, and setting their widths."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from matquant.errors import UserError
from matquant.formats.parent import TRANSFORM_KEY
from matquant.formats.planes import NestedPlanes
from matquant.inference.linear import NestedLinear

if TYPE_CHECKING:
    from matquant.formats.parent import Parent

_NAMED = 3  # names in one sentence


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """The nested layers of a model by their full dotted names, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def set_bits(
    model: nn.Module, bits: int | Mapping[str, int], prefill: int | Mapping[str, int] | None = None
) -> dict[str, int]:
    """Set the width of every nested layer of a model, or of those that an allocation names.

    Args:
        bits: one width for all, or a width for each of some layers by full name; the others stay as they are.
        prefill: the same for calls with more than one token per sequence; None, and layers that it does not name, take
            that of ``bits``.

    Returns:
        The width of decoding of every nested layer, by name.

    Raises:
        UserError: a name is no nested layer, or a layer has not the planes of a width; nothing has changed then.
    """
    layers = nested_layers(model)
    if not layers:
        raise UserError("The model has no nested layer whose width could be set. Call replace_linears first.")
    widths, prefills = _by_layer(bits, layers), _by_layer(prefill, layers)
    for wanted in (widths, prefills):
        for name, width in wanted.items():
            try:
                layers[name].check_bits(width)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    for name in widths.keys() | prefills.keys():
        layer = layers[name]
        width = widths.get(name, layer.decode_bits)
        layer.set_bits(width, prefills.get(name, width))
    return {name: layer.decode_bits for name, layer in layers.items()}


def replace_linears(
    model: nn.Module, parent: "Parent | Path | str", max_bits: int | None = None
) -> dict[str, NestedLinear]:
    """Swap the linear layers that a parent has for nested ones with the parent's weights, in place.

    Layer by layer: each one's dense weight is let go before the next is packed. Planes go to the device of the dense
    weight, to the CPU from the meta device; a bias stays as it is.

    Args:
        model: with the layers at the names that the parent has: the one it was made from, or the same without weights.
        parent: an open parent, or its folder: ``parent.path`` in a run's ``results.json``.
        max_bits: keep only the planes that widths up to this one need; None keeps all.

    Returns:
        The new layers by name, at their largest width.

    Raises:
        UserError: a layer of the parent is missing in the model, no linear layer or of another shape; nothing has changed
            then. Or the folder is no parent, or a damaged one.
    """
    if isinstance(parent, str | Path):
        parent = _open_parent(Path(parent))
    _check_transform(model, parent.transform)
    for block in parent.blocks:
        for name, about in block["layers"].items():
            _check_linear(model, name, tuple(about["shape"]))
    layers = {}
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            dense: Any = model.get_submodule(name)
            device = dense.weight.device
            planes = NestedPlanes.pack(weight, max_bits).to("cpu" if device.type == "meta" else device)
            layers[name] = NestedLinear.from_planes(planes, dense.bias).train(dense.training)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layers[name])
            del dense
    return layers


def _open_parent(folder: Path) -> "Parent":
    from matquant.formats.parent import Parent
    from matquant.store.artifact import read_artifact

    try:
        return Parent(read_artifact(folder))
    except (UserError, KeyError) as error:
        raise UserError(f"{folder} is no parent that could be read: {error}.") from error


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
            "original weights. Call matquant.transforms.apply_transform(model, parent.transform) first, or load a packed "
            "folder."
        )
    raise UserError(
        f"The model's weights passed the transform {dict(found)}, those of the parent {dict(transform)}. Load the "
        "original model, and call matquant.transforms.apply_transform(model, parent.transform)."
    )


def _check_linear(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the module ``name`` is a linear layer whose weight is of this shape [out, in]."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise UserError(
            f"The parent has a layer {name}, and this model has none of that name. Was the parent made from it?"
        ) from error
    if isinstance(module, nn.Linear):
        found = tuple(module.weight.shape)
    elif type(module).__name__ == "Conv1D":  # of Transformers: a linear layer whose weight is [in, out]
        found = tuple(module.weight.shape[::-1])
    else:
        raise UserError(f"{name} is a {type(module).__name__}, not a linear layer; it cannot be replaced.")
    if found != shape:
        raise UserError(f"{name} is {found} in the model and {shape} in the parent. Was the parent made from it?")
    bias = module.bias
    if isinstance(bias, torch.Tensor) and bias.is_meta:
        raise UserError(
            f"The bias of {name} has no values (it is on the meta device). Load the unquantized tensors first."
        )


def _by_layer(bits: int | Mapping[str, int] | None, layers: dict[str, NestedLinear]) -> Mapping[str, int]:
    """A width for each layer that gets one."""
    if bits is None:
        return {}
    if not isinstance(bits, Mapping):
        return dict.fromkeys(layers, bits)
    unknown = [name for name in bits if name not in layers]
    if unknown:
        close = difflib.get_close_matches(unknown[0], layers, n=1, cutoff=0.0)
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise UserError(
            f"{len(unknown)} of the {len(bits)} layers are no nested layers of this model: "
            f"{', '.join(unknown[:_NAMED])}{more}. The name nearest to {unknown[0]} is {close[0]}."
        )
    return bits
