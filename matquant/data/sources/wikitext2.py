"""WikiText-2: all lines of a split, joined by empty lines."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from matquant.data.config import TextConfig
from matquant.data.sources.hub import PublishedSource, random_windows


class WikiText2Source(PublishedSource):
    """Test split for the evaluation, train split for the calibration."""

    name = "wikitext2"
    revision = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
    separator = "\n\n"

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        rows = self.load(name="wikitext-2-raw-v1", split="test" if split == "evaluation" else "train")
        yield from rows["text"]

    def calibration_windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        ids = self.token_ids(text, split, tokenizer)
        return random_windows(ids, text.sequences, text.sequence_length, text.seed or 0)
