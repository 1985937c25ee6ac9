"""Settings that every weight transform shares."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matquant.transforms.base import WeightTransform


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Settings of no transform, and base class of the settings of each transform.

    Attributes:
        name: of the preset.
    """

    name: str = "none"

    def build(self, model: Any) -> "WeightTransform | None":
        """Construct the transform for a causal language model of Transformers; None for no transform.

        Raises:
            UserError: the transform has no matrix for a size of the model.
        """
        return None
