"""Settings of a text: its source, and the token windows that are cut from it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from matquant.errors import UserError

_MIXABLE = ("stdlib", "wikitext2", "c4", "fineweb_edu", "local")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Text cut into ``sequences`` windows of ``sequence_length`` tokens.

    Attributes:
        path: of dataset ``local``: a file, or a folder of .txt, .md, .py, .jsonl and .parquet files.
        seed: of the random choice of windows; None takes the first ones.
        batch_size: windows of one forward pass; ``auto`` in a config: as many as make 4096 tokens.
        field: of a row of .jsonl and .parquet; None: text, messages or content.
        bos: begin each window with the beginning-of-text token; None: where the tokenizer adds one by itself.
        mix: of dataset ``mix``: weight of each dataset.
    """

    dataset: Literal["stdlib", "wikitext2", "c4", "fineweb_edu", "local", "mix"]
    path: str | None = None
    sequences: int = 128
    sequence_length: int = 2048
    seed: int | None = 0
    batch_size: int = 1
    field: str | None = None
    bos: bool | None = None
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)


def check_text(text: TextConfig, where: str) -> None:
    """Check the settings of a text.

    Args:
        where: of the text in the config, such as ``calibration``.

    Raises:
        UserError: a value is out of range, or settings contradict each other.
    """
    for name, least in {"sequences": 1, "sequence_length": 2, "batch_size": 1}.items():
        if getattr(text, name) < least:
            raise UserError(f"{where}.{name} must be at least {least}; found {getattr(text, name)}.")
    if "local" in (text.dataset, *text.mix) and text.path is None:
        raise UserError(f"{where}.dataset={text.dataset} needs {where}.path: a text file or a folder of them.")
    if (text.dataset == "mix") != bool(text.mix):
        raise UserError(
            f"{where}.mix gives each dataset a weight, and goes with {where}.dataset=mix; found {dict(text.mix)}."
        )
    for name, weight in text.mix.items():
        if name not in _MIXABLE or not 0 < weight < math.inf:
            raise UserError(
                f"{where}.mix.{name}={weight}: a mix is of stdlib, wikitext2, c4, fineweb_edu and local, with weights above 0."
            )
