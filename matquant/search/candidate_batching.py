"""Several candidates in one forward pass, each layer at a width of its own for each of them.

On a few windows a small model is bound by the number of calls and not by what they compute. So the windows of some candidates
go through the model one after the other in one batch: norms, attention and layers on which the candidates agree take one call
for all of them, and a layer on which they differ takes one for each run of equal widths. What candidates that agree on their
first blocks have in common is computed once.
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


class Text:
    """Some windows of one length on their way into the blocks, in as many copies as there are candidates.

    Attributes:
        ids: int64 [windows, length], on the model's device.
        hidden: what enters block 0, [windows, length, hidden]; the same for every copy.
    """

    def __init__(self, blocks: BlockModel, ids: Tensor) -> None:
        self.ids = ids
        self._blocks = blocks
        self.hidden, calls = blocks.capture_batch(ids)
        self._calls = {1: calls}

    def copies(self, count: int) -> Tensor:
        """The ids of ``count`` copies, [count * windows, length]."""
        return self.ids.repeat(count, 1)

    def calls(self, count: int) -> PerBlockKwargs:
        """What each block is called with for ``count`` copies."""
        if count not in self._calls:
            self._calls[count] = self._blocks.capture_batch(self.copies(count))[1]
        return self._calls[count]


def branches(alike: Sequence[int], index: int) -> list[int]:
    """Of candidates in a row, the first of each run that has the same blocks up to ``index``.

    Args:
        alike: how many first blocks each candidate has in common with the one before it, but for the first candidate.
    """
    return [0, *(number for number, blocks in enumerate(alike, 1) if blocks <= index)]


def spread(hidden: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Hidden states of the candidates ``after``, each of which is one of ``before`` or follows it there.

    Args:
        hidden: [len(before) * windows, length, hidden].
        before: ascending, from 0.
        after: likewise, with all of ``before`` among them.
    """
    if len(before) == len(after):
        return hidden
    parts = hidden.split(len(hidden) // len(before))
    return torch.cat([parts[bisect.bisect_right(before, number) - 1] for number in after])


def by_width(widths: Sequence[int], serve: Callable[[int], Forward]) -> list[tuple[int, Forward]]:
    """The runs of equal widths: how many copies each has, and what stands for the layer there."""
    return [(len(list(run)), serve(bits)) for bits, run in groupby(widths)]


def forward_by_width(
    hidden: Tensor, *, runs: Sequence[tuple[int, Forward]], rows: int, length: int, name: str
) -> Tensor:
    """A layer's output where copies of the text differ in its width.

    Args:
        hidden: [rows, length, in_features], or its first two dimensions in one.
        runs: as ``by_width`` gives them.
        rows: windows of all copies.
        length: of a window.
        name: of the layer.

    Raises:
        UserError: the layer sees other rows than those that entered its block.
    """
    if hidden.shape[0] != rows and hidden.shape[:-1] != (rows * length,):
        raise UserError(
            f"{name} gets an input of shape {list(hidden.shape)} for {rows} windows of {length} tokens, so that candidates of "
            "this architecture cannot be measured together. Set search.batch_size=1."
        )
    each = hidden.shape[0] // sum(count for count, _ in runs)
    pieces = hidden.split([count * each for count, _ in runs])
    return torch.cat([forward(piece) for (_, forward), piece in zip(runs, pieces, strict=True)])
