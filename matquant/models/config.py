"""Settings of the model: where its checkpoint is, and the dtype of its weights."""

import dataclasses
from typing import Literal

from matquant.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Checkpoint to load: a hub ``name`` or a local ``path``.

    Attributes:
        label: name of the model in results; the last part of ``name`` or ``path`` if None.
        name: of a repository on the hub.
        path: of a local folder, or of a GGUF file.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; auto: as stored.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    label: str | None = None
    name: str | None = None
    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: bool = False


def check(config: ModelConfig) -> None:
    """Raise UserError unless exactly one of ``name`` and ``path`` is set."""
    if (config.name is None) == (config.path is None):
        raise UserError(
            "Set either model.name (a repository on the hub) or model.path (a local folder or a GGUF file); found "
            f"model.name={config.name} and model.path={config.path}."
        )
