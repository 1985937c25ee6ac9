"""Check of token ids against the embeddings: a tokenizer may have tokens without an embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.models.loading import LoadedModel


def embedded_tokens(model: Any) -> int:
    """Number of token ids that both the embeddings and the head of a causal language model have a row for."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(module.weight.shape[0]) for module in modules if getattr(module, "weight", None) is not None)


def has_foreign_tokens(loaded: LoadedModel) -> bool:
    """Return True if the tokenizer can give ids that the model has no embedding for."""
    return max(loaded.tokenizer.get_vocab().values(), default=-1) >= embedded_tokens(loaded.model)


def check_token_ids(loaded: LoadedModel, ids: Tensor | Sequence[int], where: str) -> None:
    """Check that the model has an embedding for every token of a text.

    Args:
        ids: int64 of any shape, or a list of ids.
        where: name of the text, at the start of the sentence.

    Raises:
        UserError: names the first token without an embedding.
    """
    ids, rows = torch.as_tensor(ids), embedded_tokens(loaded.model)
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.numel():
        token = int(outside[0])
        raise UserError(
            f"{where} has the token {token} ({loaded.tokenizer.decode([token])!r}), but {loaded.label} has embeddings for ids "
            f"below {rows} only: the tokenizer belongs to another model, or tokens were added to it without "
            "model.resize_token_embeddings. Give the model its own tokenizer, or remove such tokens from the text."
        )
