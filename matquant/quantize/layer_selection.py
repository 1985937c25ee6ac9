"""Selection of the layers to quantize, and checks of their weights."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.formats.groups import largest_of_groups
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.models.blocks import BlockModel
from matquant.models.finite import is_finite, non_finite_weights


def layers_to_quantize(
    model: BlockModel, skips: Callable[[str], bool], *, lm_head: bool, fixed: Collection[str] = ()
) -> list[dict[str, nn.Linear]]:
    """Linear layers of each block by full name, the head's last if ``lm_head`` is set.

    Args:
        skips: predicate on names of layers that the settings leave out.
        fixed: names of layers that cannot be quantized, see ``models.fixed_layers``.
    """
    return [
        {name: layer for name, layer in model.linears(index).items() if name not in fixed and not skips(name)}
        for index in range(len(model) + lm_head)
    ]


def check_layers(layers: Sequence[Mapping[str, nn.Linear]]) -> None:
    """Raise UserError if there is no layer to quantize."""
    if not any(layers):
        raise UserError("method.skip leaves no layer to quantize.")


def float_weight(name: str, layer: nn.Linear, device: torch.device) -> Tensor:
    """Weight of a layer as float32 [out_features, in_features] on ``device``. Raises UserError for NaN or Inf."""
    weight = layer.weight.detach().to(device).float()
    if not is_finite(weight):
        raise UserError(non_finite_weights(f"{name}.weight"))
    return weight


def check_weight_range(layer: str, largest: float, weight_format: WeightFormat) -> None:
    """Check that some scale in the dtype of stored scales fits a layer's weights.

    Args:
        largest: largest absolute value of the weights.

    Raises:
        UserError: every scale of the layer would overflow, or underflow to 0.
    """
    half_range = 2.0 ** (weight_format.master_bits - 1)
    # Scales of the layer's groups lie within a factor of 4 below and 2 above this one, or below that.
    scale = torch.tensor(largest / half_range, dtype=torch.float64)
    too_large = torch.isinf((scale / 4).to(weight_format.scale_dtype))
    too_small = largest > 0 and (scale * 2).to(weight_format.scale_dtype) == 0
    if too_large or too_small:
        raise UserError(_unsuitable_scales(layer, largest, weight_format))


def check_scales(name: str, weight: Tensor, quantized: NestedWeight) -> list[str]:
    """Check the scales of a quantized layer.

    Args:
        weight: [out_features, in_features], on the device of ``quantized``.

    Returns:
        Sentence on groups whose scales underflow to 0; empty without any.

    Raises:
        UserError: scales overflow their dtype.
    """
    sets = [quantized.scales, *quantized.own_scales.values()]  # [out_features, groups] each
    if not all(is_finite(scales) for scales in sets):
        raise UserError(_unsuitable_scales(name, weight.abs().max().item(), quantized.format))
    lost = torch.stack([scales == 0 for scales in sets]).any(0)
    if not lost.any():
        return []
    largest = largest_of_groups(weight, quantized.format.group_size)[lost]
    if not (count := int((largest > 0).sum())):
        return []
    dtype, most = _dtype_name(quantized.format), largest.max().item()
    return [
        f"{count} of {lost.numel()} groups of {name} have weights of at most {most:.3g}, whose scales underflow {dtype}: "
        "these weights are read as 0. model.dtype=bfloat16 keeps them."
    ]


def check_errors(name: str, errors: Mapping[str, float]) -> None:
    """Raise UserError if the relative error of a layer at some bit-width is not finite."""
    if wrong := [bits for bits, error in errors.items() if not math.isfinite(error)]:
        raise UserError(
            f"The error of {name} at {', '.join(wrong)} bits is not finite: its weights or calibration inputs are too large "
            "for float32. Skip the layer with method.skip, or check the model and the calibration text."
        )


def _unsuitable_scales(name: str, largest: float, weight_format: WeightFormat) -> str:
    amount = "much" if largest > 1 else "little"
    return (
        f"The weights of {name} reach {largest:.3g}, too {amount} for scales in {_dtype_name(weight_format)}. Skip the layer "
        "with method.skip, or set model.dtype=bfloat16."
    )


def _dtype_name(weight_format: WeightFormat) -> str:
    return str(weight_format.scale_dtype).removeprefix("torch.")
