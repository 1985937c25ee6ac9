"""What a decoder block is called with beside its hidden states, kept apart from them and shared between batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockKwargs:
    """What a block is called with beside its hidden states: masks, position embeddings and so on.

    ``place`` is where the hidden states go: the position of an argument, or its name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    def fill(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the block for these hidden states."""
        if isinstance(self.place, int):
            return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), dict(self.kwargs)
        return self.args, {**self.kwargs, self.place: hidden}


BlockKwargsList = list[BlockKwargs]  # one for each block


def split_block_args(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockKwargs]:
    """A block's hidden states, and its call without them."""
    if args:
        return args[0], BlockKwargs((None, *args[1:]), dict(kwargs), 0)
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], BlockKwargs((), {**kwargs, name: None}, name)


def share_tensors(new: BlockKwargs, old: BlockKwargs, memo: dict[tuple[int, int], Any]) -> BlockKwargs:
    """``new`` with what it has in common with ``old`` taken from there; ``memo`` is kept over all blocks of a batch."""
    return BlockKwargs(_share(new.args, old.args, memo), _share(dict(new.kwargs), dict(old.kwargs), memo), new.place)


def _share(new: Any, old: Any, memo: dict[tuple[int, int], Any]) -> Any:
    """``new`` with every tensor that equals the one at the same place in ``old`` replaced by that one."""
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
    alike = new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
    return alike and torch.equal(new, old)
