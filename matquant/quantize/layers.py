"""Selection of the layers to quantize, and checks of their weights."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockModel


def layers_to_quantize(model: BlockModel, skips: Callable[[str], bool], *, lm_head: bool) -> list[dict[str, nn.Linear]]:
    """Linear layers of each block by full name, without the skipped ones; the head's last if ``lm_head`` is set."""
    return [
        {name: layer for name, layer in model.linears(index).items() if not skips(name)}
        for index in range(len(model) + lm_head)
    ]


def check_layers(layers: Sequence[Mapping[str, nn.Linear]]) -> None:
    """Raise UserError if there is no layer to quantize."""
    if not any(layers):
        raise UserError("method.skip leaves no layer to quantize.")


def float_weight(name: str, layer: nn.Linear, device: torch.device) -> Tensor:
    """Weight of a layer as float32 [out_features, in_features] on ``device``. Raises UserError for NaN or Inf."""
    weight = layer.weight.detach().to(device).float()
    if not torch.isfinite(weight).all():
        raise UserError(
            f"The weights of {name} hold NaN or Inf. Fix the checkpoint, or skip the layer with method.skip."
        )
    return weight


def check_scales(name: str, weight: Tensor, quantized: NestedWeight) -> None:
    """Raise UserError if the scales of a quantized layer overflow their dtype."""
    if not all(torch.isfinite(s).all() for s in (quantized.scales, *quantized.own_scales.values())):
        raise UserError(
            f"The weights of {name} reach {weight.abs().max():.3g}, too much for scales in {quantized.format.scale_dtype}. "
            "Skip the layer with method.skip, or set model.dtype=bfloat16."
        )
