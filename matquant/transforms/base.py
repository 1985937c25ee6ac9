"""Seam of the weight transforms: a transform maps the tensors of a model to other tensors that give the same outputs.

A transform depends on the model's structure (``plan``), but on no files and devices. ``BlockModel`` applies the plan
wherever weights are
materialized: while blocks run, when a model is filled, and when it is packed.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from matquant.models.blocks import BlockModel
from matquant.models.materializer import TensorFunction


class WeightTransform(abc.ABC):
    """Invertible transform of a model's weights.

    Attributes:
        name: key in ``matquant.transforms.TRANSFORMS``.
        unties_embeddings: True if a head that is tied to the embeddings needs weights of its own afterwards.
    """

    name: ClassVar[str]
    unties_embeddings: bool = False

    @abc.abstractmethod
    def plan(self, model: BlockModel) -> Mapping[str, TensorFunction]:
        """Plan the transform of one model.

        Args:
            model: with its original weights.

        Returns:
            For each tensor that changes, by full name, a function from its original values to the new ones: same shape,
            dtype and device.

        Raises:
            UserError: the architecture is not supported.
        """

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """JSON-able description: ``name``, all settings, seeds, and the SHA-256 of the matrices.

        It is part of a parent's key and manifest: two transforms with equal descriptions give equal weights.
        """

    @classmethod
    @abc.abstractmethod
    def from_json(cls, description: Mapping[str, Any]) -> "WeightTransform":
        """Rebuild the transform from ``to_json``. Raises UserError if the matrices cannot be reproduced."""
