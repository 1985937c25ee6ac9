"""Base class of the text sources, and the windows that are cut from their documents."""

import abc
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from matquant.data.config import TextConfig
from matquant.errors import UserError

# Most documents that are tokenized in one call: enough for the threads of a fast tokenizer, with little memory for their ids.
DOCUMENTS_PER_BATCH = 64


class TextSource(abc.ABC):
    """Text to calibrate or evaluate on.

    By default all documents are tokenized without special tokens, each is followed by the end-of-text token if the tokenizer
    has one, and the resulting row of tokens is cut. With a seed, windows are drawn from the whole row without replacement and
    kept in the order of the text; without one, they are the first.

    Attributes:
        name: value of ``dataset``.
        revision: repository and commit on the hub; None for a text that is not on the hub.
        has_splits: True if the splits do not overlap; False if all splits are the same text.
        has_cached_windows: True if the store keeps windows.
        has_bos_by_default: True if windows begin with the beginning-of-text token where the tokenizer adds one by itself.
        reads_files: True if the text is at ``TextConfig.path``, with its texts in ``TextConfig.field``.
        is_streamed: True for a text that is too long to be read whole; its windows are the first ones, also with a seed.
    """

    name: ClassVar[str]
    revision: ClassVar[tuple[str, str] | None] = None
    has_splits: ClassVar[bool] = True
    has_cached_windows: ClassVar[bool] = True
    has_bos_by_default: ClassVar[bool] = True
    reads_files: ClassVar[bool] = False
    is_streamed: ClassVar[bool] = False

    @abc.abstractmethod
    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        """Documents of a split in a fixed order. Raises UserError if they cannot be read."""

    def windows(self, text: TextConfig, split: str, tokenizer: Any) -> Tensor:
        """Token windows of a split, int64 [sequences, sequence_length]. Raises UserError for too little text."""
        bos = self.bos_token(text, tokenizer)
        found = self._cut(text, split, tokenizer, text.sequence_length - (bos is not None))
        return found if bos is None else torch.cat([torch.full((len(found), 1), bos), found], 1)

    def check(self, text: TextConfig, where: str) -> None:  # noqa: B027  (optional)
        """Raise UserError for settings that the source cannot read; ``where`` is their place in the config."""

    def file_hashes(self, text: TextConfig) -> list[str]:
        """SHA-256 of the files that a text without a revision is read from."""
        return []

    def notes(self, text: TextConfig) -> list[str]:
        """Sentences for the user on omitted parts of the text."""
        return []

    def describe(self, text: TextConfig, split: str) -> str:
        """Name of the text in messages."""
        return self.name

    def bos_token(self, text: TextConfig, tokenizer: Any) -> int | None:
        """Token that every window begins with; None for no such token. Raises UserError if the tokenizer lacks it."""
        bos: int | None = getattr(tokenizer, "bos_token_id", None)
        if text.bos is None:
            wanted = self.has_bos_by_default and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
            return bos if wanted else None
        if text.bos and bos is None:
            raise UserError(
                "bos=true, but the model's tokenizer has no beginning-of-text token. Set it to null or false."
            )
        return bos if text.bos else None

    def too_short(self, text: TextConfig, split: str, tokens: int, available: int) -> UserError:
        """Error of a text with fewer windows than ``sequences``."""
        return UserError(
            f"Too little text: {text.sequences} windows of {text.sequence_length} tokens were requested "
            f"({text.sequences * text.sequence_length} tokens), but {self.describe(text, split)} gives {tokens} tokens, "
            f"which make {available}. Lower sequences or sequence_length, or give a longer text."
        )

    def _cut(self, text: TextConfig, split: str, tokenizer: Any, length: int) -> Tensor:
        """Windows without a beginning-of-text token, int64 [sequences, length]."""
        drawn = text.seed is not None and not self.is_streamed
        documents = self.documents(text, split, tokenizer)
        row = token_row(documents, tokenizer, None if drawn else text.sequences * length)
        available = len(row) // length
        if available < text.sequences:
            raise self.too_short(text, split, len(row), available)
        cut = row[: available * length].view(available, length)
        if not drawn:
            return cut[: text.sequences].clone()
        generator = torch.Generator().manual_seed(text.seed or 0)
        return cut[torch.randperm(available, generator=generator)[: text.sequences].sort().values]


def check_characters(text: str, where: str) -> None:
    """Raise UserError if a text holds lone surrogates, which no tokenizer reads; ``where`` is its place."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])[1:-1]
        raise UserError(
            f"{where} holds half a character ({found}, a lone surrogate) at position {error.start}: the text was cut or "
            "converted wrongly. Replace it, for example by U+FFFD, or remove it."
        ) from error


def token_row(documents: Iterable[str], tokenizer: Any, min_tokens: int | None) -> Tensor:
    """Token ids of documents in one row, int64 [tokens].

    Args:
        min_tokens: stop after the batch of documents with which the row has so many tokens, where each batch is twice as
            large as the one before it, up to DOCUMENTS_PER_BATCH; None reads all documents.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    tokens = 0
    iterator = iter(documents)
    size = 1 if min_tokens else DOCUMENTS_PER_BATCH
    while (min_tokens is None or tokens < min_tokens) and (batch := list(islice(iterator, size))):
        # Not verbose: no warning about a text that is longer than the model's context.
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        pieces += [torch.tensor([*ids, *end], dtype=torch.int64) for ids in encoded]
        tokens += sum(len(ids) + len(end) for ids in encoded)
        size = min(2 * size, DOCUMENTS_PER_BATCH)
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
