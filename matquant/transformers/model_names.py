"""Names of a checkpoint's layers and tensors in a model that may have another head than the one that was packed.

``AutoModel`` has the base model alone, ``AutoModelForSequenceClassification`` the same base model with another head. As for
unquantized checkpoints, the prefix of the base model is added or removed, tensors of a head that the model does not have are
not loaded, and those of a head that the checkpoint does not have are initialized.
"""

import dataclasses
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from matquant.formats.packed import NestedSpec


class ModelNames:
    """Mapping from the names in a checkpoint to those in a model.

    Args:
        model: any model of Transformers.

    Attributes:
        same_model: True if the checkpoint was packed from a model of this class, so that it must hold all of its tensors and
            no others.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        name = getattr(model, "base_model_prefix", "")
        self._prefix = f"{name}." if name else ""
        self._base = getattr(model, name, None) if name else None
        config = model.config
        packed = list(getattr(config, "architectures", None) or [])
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        self.same_model = not packed or type(model).__name__ in packed or type(model) is causal

    def of(self, name: str) -> str | None:
        """Name in the model of a module or tensor; None for a part of a head that the model does not have."""
        if not self._prefix:
            return name
        if self._base is None and name.startswith(self._prefix):
            return name.removeprefix(self._prefix)
        if _has_child(self.model, name):
            return name
        if self._base is not None and _has_child(self._base, name):
            return self._prefix + name
        return name if self.same_model else None

    def may_be_missing(self, name: str) -> bool:
        """Return True for a tensor of the model's head, if the checkpoint may have another one."""
        return not self.same_model and self._base is not None and not name.startswith(self._prefix)

    def rename_spec(self, spec: NestedSpec) -> NestedSpec:
        """Description of the part of a checkpoint that is in the model, by the names in the model."""
        layers = {new: layer for name, layer in spec.layers.items() if (new := self.of(name)) is not None}
        bits = {new: bits for name, bits in spec.layer_bits.items() if (new := self.of(name)) is not None}
        unconverted = [new for name in spec.modules_to_not_convert if (new := self.of(name)) is not None]
        return dataclasses.replace(spec, layers=layers, layer_bits=bits, modules_to_not_convert=tuple(unconverted))


def _has_child(module: Any, name: str) -> bool:
    """Return True if the first part of a dotted name is a child or tensor of a module."""
    first = name.partition(".")[0]
    return first in module._modules or first in module._parameters or first in module._buffers
