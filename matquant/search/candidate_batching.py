"""Several candidates in one forward pass, with a different bit-width per candidate in each layer.

On a few sequences the run time of a small model depends on the number of calls, not on the number of tokens. So the
sequences of several candidates are concatenated along the batch dimension. Norms, attention and layers with one
bit-width take one call for all candidates. Other layers take one call per run of equal bit-widths. Blocks whose input
and bit-widths are equal for several candidates are computed once.

Terms: a *copy* is the token batch of one candidate; ``rows`` are sequences of all copies, [copies * sequences].
"""

import bisect
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.models.block_kwargs import PerBlockKwargs
from matquant.models.blocks import BlockModel

Forward = Callable[[Tensor], Tensor]


class TokenBatch:
    """Sequences of equal length, prepared for any number of copies.

    Attributes:
        ids: int64 [sequences, length], on the model's device.
        hidden: input of block 0, [sequences, length, hidden]; equal for all copies.
    """

    def __init__(self, blocks: BlockModel, ids: Tensor) -> None:
        self.ids = ids
        self._blocks = blocks
        self.hidden, kwargs = blocks.capture_batch(ids)
        self._kwargs = {1: kwargs}

    def repeat_ids(self, copies: int) -> Tensor:
        """Token ids of several copies, int64 [copies * sequences, length]."""
        return self.ids.repeat(copies, 1)

    def block_kwargs(self, copies: int) -> PerBlockKwargs:
        """Arguments of each block, beside the hidden states, for several copies."""
        if copies not in self._kwargs:
            self._kwargs[copies] = self._blocks.capture_batch(self.repeat_ids(copies))[1]
        return self._kwargs[copies]


def divergence_points(common_blocks: Sequence[int], index: int) -> list[int]:
    """First candidate of each run of candidates with equal blocks 0 to ``index``.

    Args:
        common_blocks: number of leading blocks that each candidate, from the second on, shares with the candidate
            before it.
    """
    return [0, *(candidate for candidate, blocks in enumerate(common_blocks, 1) if blocks <= index)]


def expand(hidden: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Repeat the hidden states of the candidates ``before`` for the candidates ``after``.

    Args:
        hidden: [len(before) * sequences, length, hidden].
        before: candidates with hidden states, ascending, the first is 0.
        after: candidates that need hidden states, ascending; contains ``before``. Each one takes the hidden states of
            the last candidate in ``before`` that does not follow it.

    Returns:
        [len(after) * sequences, length, hidden].
    """
    if len(before) == len(after):
        return hidden
    parts = hidden.split(len(hidden) // len(before))
    return torch.cat([parts[bisect.bisect_right(before, candidate) - 1] for candidate in after])


def runs_by_bits(bits: Sequence[int], forward_for: Callable[[int], Forward]) -> list[tuple[int, Forward]]:
    """Number of copies and forward function of each run of equal bit-widths."""
    return [(len(list(run)), forward_for(value)) for value, run in groupby(bits)]


def forward_by_bits(
    hidden: Tensor, *, runs: Sequence[tuple[int, Forward]], rows: int, length: int, name: str
) -> Tensor:
    """Output of a layer with several bit-widths.

    Args:
        hidden: [rows, length, in_features], or [rows * length, in_features].
        runs: result of ``runs_by_bits``.
        rows: sequences of all copies.
        length: tokens of a sequence.
        name: name of the layer, for the error message.

    Raises:
        UserError: the shape of ``hidden`` does not match ``rows`` and ``length``.
    """
    if hidden.shape[0] != rows and hidden.shape[:-1] != (rows * length,):
        raise UserError(
            f"The input of {name} has shape {list(hidden.shape)}, which does not match {rows} sequences of {length} tokens. "
            "This architecture cannot evaluate several candidates in one batch. Set search.batch_size=1."
        )
    rows_per_copy = hidden.shape[0] // sum(copies for copies, _ in runs)
    pieces = hidden.split([copies * rows_per_copy for copies, _ in runs])
    return torch.cat([forward(piece) for (_, forward), piece in zip(runs, pieces, strict=True)])
