"""C4: the first documents of the validation split for the evaluation, random documents of the train split for calibration."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from matquant.data.config import TextConfig
from matquant.data.sources.hub import PublishedSource
from matquant.errors import UserError

_EVALUATION_DOCUMENTS = 1100
_MAX_TRIES = 1000  # documents that are drawn for one window, on average


class C4Source(PublishedSource):
    """First file of each split. A calibration window is a random part of a random document that is longer than it."""

    name = "c4"
    revision = ("allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87")
    separator = " "

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        rows = self._rows(split)
        yield from rows[:_EVALUATION_DOCUMENTS]["text"] if split == "evaluation" else (row["text"] for row in rows)

    def calibration_windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        rows, drawn, length = self._rows(split), random.Random(text.seed or 0), text.sequence_length
        windows: list[list[int]] = []
        for _ in range(_MAX_TRIES * text.sequences):
            ids = tokenizer(rows[drawn.randint(0, len(rows) - 1)]["text"], verbose=False)["input_ids"]
            if len(ids) > length:
                start = drawn.randint(0, len(ids) - length - 1)
                windows.append(ids[start : start + length])
            if len(windows) == text.sequences:
                return torch.tensor(windows)
        raise UserError(f"C4 holds too few documents of more than {length} tokens. Lower sequence_length.")

    def _rows(self, split: str) -> Any:
        if split == "evaluation":
            return self.load(data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"}, split="validation")
        return self.load(data_files={"train": "en/c4-train.00000-of-01024.json.gz"}, split="train")
