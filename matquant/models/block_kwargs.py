"""Arguments of a decoder block other than its hidden states, shared between batches where they are equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockKwargs:
    """Arguments of one call of a block without its hidden states: masks, position embeddings and so on.

    Attributes:
        args, kwargs: positional and named arguments; None in the place of the hidden states.
        hidden_key: argument that takes the hidden states: its position or its name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_key: int | str

    def bind(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the block with these hidden states."""
        if isinstance(self.hidden_key, int):
            return (*self.args[: self.hidden_key], hidden, *self.args[self.hidden_key + 1 :]), dict(self.kwargs)
        return self.args, {**self.kwargs, self.hidden_key: hidden}


PerBlockKwargs = list[BlockKwargs]  # one entry per block, all of one batch


def split_block_args(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockKwargs]:
    """Split the arguments of a block into its hidden states and the rest."""
    if args:
        return args[0], BlockKwargs((None, *args[1:]), dict(kwargs), 0)
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], BlockKwargs((), {**kwargs, name: None}, name)


def share_tensors(new: BlockKwargs, old: BlockKwargs, memo: dict[tuple[int, int], Any]) -> BlockKwargs:
    """Return ``new`` with each tensor that equals its counterpart in ``old`` replaced by that one.

    Args:
        memo: results of the comparisons so far; use one dict for all blocks of a batch.
    """
    return BlockKwargs(
        _share(new.args, old.args, memo), _share(dict(new.kwargs), dict(old.kwargs), memo), new.hidden_key
    )


def _share(new: Any, old: Any, memo: dict[tuple[int, int], Any]) -> Any:
    """Nested containers of ``new`` with the tensors of ``old`` where both are equal."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        key = (id(new), id(old))
        if key not in memo:  # all blocks have the same masks: compare them once
            memo[key] = old if _equal(new, old) else new
        return memo[key]
    if type(new) is not type(old):
        return new
    if type(new) in (tuple, list) and len(new) == len(old):
        return type(new)(_share(a, b, memo) for a, b in zip(new, old, strict=True))
    if type(new) is dict:
        return {name: _share(value, old.get(name), memo) for name, value in new.items()}
    return new


def _equal(new: Tensor, old: Tensor) -> bool:
    comparable = new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
    return comparable and torch.equal(new, old)
