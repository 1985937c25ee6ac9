"""Registry of the weight transforms, and their application to a whole model."""

from collections.abc import Mapping
from typing import Any

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.transforms.base import WeightTransform
from matquant.transforms.rotation import ResidualRotation

TRANSFORMS: dict[str, type[WeightTransform]] = {ResidualRotation.name: ResidualRotation}


def transform_from_json(description: Mapping[str, Any]) -> WeightTransform:
    """Rebuild a transform from its description, such as ``Parent.transform``.

    Raises:
        UserError: the transform is unknown, or this machine computes other matrices than those of the description.
    """
    name = description.get("name")
    if name not in TRANSFORMS:
        raise UserError(
            f"There is no weight transform {name!r}; there are {', '.join(TRANSFORMS)}. Update matquant, or quantize "
            "the model again."
        )
    return TRANSFORMS[name].from_json(description)


def apply_transform(model: Any, transform: WeightTransform | Mapping[str, Any]) -> None:
    """Transform the weights of a whole model in place.

    Its logits stay equal up to the rounding of the new weights to the model's dtype.

    Args:
        model: causal language model of Transformers in eval mode, with its original weights in memory.
        transform: the transform, or its description: ``Parent.transform``.

    Raises:
        UserError: the model is transformed already, has weights on the meta device, or is not supported by the
            transform.
    """
    transform = transform if isinstance(transform, WeightTransform) else transform_from_json(transform)
    BlockModel(model, transform=transform).transform_in_place()
