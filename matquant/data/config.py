"""Settings of a text: its source, and the token windows that are cut from it."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Text cut into ``sequences`` windows of ``sequence_length`` tokens.

    Attributes:
        dataset: name of a source in ``matquant.data.sources``, or ``mix``.
        sequences: number of windows.
        sequence_length: tokens of a window.
        path: of dataset ``local``: a file or a folder of the kinds in ``matquant.data.text_files``.
        seed: of the random choice of windows; None takes the first ones.
        batch_size: windows of one forward pass; ``auto`` in a config: as many as make 4096 tokens.
        field: column of a table; None: text, messages or content.
        bos: begin each window with the beginning-of-text token; None: where the tokenizer adds one by itself.
        mix: of dataset ``mix``: weight of each dataset.
    """

    dataset: str
    path: str | None = None
    sequences: int = 128
    sequence_length: int = 2048
    seed: int | None = 0
    batch_size: int = 1
    field: str | None = None
    bos: bool | None = None
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)
