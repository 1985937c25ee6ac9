"""Base classes of the texts on the Hugging Face hub, which are read at pinned revisions."""

import abc
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matquant.data.config import TextConfig
from matquant.data.sources.base import TextSource
from matquant.errors import UserError


class HubSource(TextSource):
    """Text of a dataset on the hub; ``revision`` is required."""

    def load(self, **settings: Any) -> Any:
        """Rows of the dataset. ``settings`` are those of ``datasets.load_dataset``.

        Raises:
            UserError: the dataset is neither in the cache nor reachable.
        """
        import datasets  # slow to import, and not needed for local texts

        assert self.revision is not None
        repository, revision = self.revision
        try:
            return datasets.load_dataset(repository, revision=revision, **settings)
        except Exception as error:  # not cached, no network, a proxy: the client raises its HTTP library's errors too
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"The text {self.name} ({repository} on the hub) is not in the cache and could not be fetched: {reason}. "
                "Try again with a network, or give a text of your own: dataset=local and path=FILE."
            ) from error


class PublishedSource(HubSource):
    """Text that is cut into the windows of published results, as in GPTQ (arXiv 2210.17323).

    Evaluation windows are consecutive, from the start of the split's documents joined by ``separator``. Calibration windows
    are from random places.
    """

    has_bos_by_default = False
    separator: str

    def windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        """Windows of ``TextSource.windows``; a beginning-of-text token replaces the first token of each."""
        bos = self.bos_token(text, tokenizer)
        calibration = split != "evaluation"
        found = (self.calibration_windows if calibration else self.evaluation_windows)(text, split, tokenizer)
        if bos is not None:
            found[:, 0] = bos
        return found

    def evaluation_windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        """Consecutive windows from the start, int64 [sequences, sequence_length]."""
        ids = self.token_ids(text, split, tokenizer)
        return torch.tensor(ids[: text.sequences * text.sequence_length]).view(text.sequences, text.sequence_length)

    @abc.abstractmethod
    def calibration_windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        """Windows from random places, int64 [sequences, sequence_length]."""

    def token_ids(self, text: TextConfig, split: str, tokenizer: Any) -> list[int]:
        """Token ids of the whole split. Raises UserError if they do not make ``sequences`` windows."""
        whole = self.separator.join(self.documents(text, split, tokenizer))
        ids: list[int] = tokenizer(whole, verbose=False)["input_ids"]
        length = text.sequence_length
        if len(ids) < text.sequences * length or len(ids) <= length:
            raise self.too_short(text, split, len(ids), len(ids) // length)
        return ids


def random_windows(ids: Sequence[int], count: int, length: int, seed: int) -> Tensor:
    """Windows from random places of one row of more than ``length`` tokens, int64 [count, length]."""
    drawn = random.Random(seed)
    starts = [drawn.randint(0, len(ids) - length - 1) for _ in range(count)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])
