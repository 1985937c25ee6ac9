"""Model in memory whose layers change bit-width in place, for one candidate or several in one batch.

Neighbouring candidates in ``sort_key`` order agree on as many leading blocks as possible. The outputs of these blocks
are computed once: ``BlockPath`` holds the hidden states of the last candidate after each block.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from matquant.models.blocks import BlockModel
from matquant.search.allocation_problem import FULL_PRECISION, AllocationUnit, Candidate
from matquant.search.candidate_batching import (
    Forward,
    TokenBatch,
    divergence_points,
    expand,
    forward_by_bits,
    runs_by_bits,
)
from matquant.search.layer_forwards import LayerForwards


class BlockPath:
    """Hidden states along the blocks for one token batch.

    Attributes:
        batch: the token batch.
        hidden: input of block 0, then the output of each block. Each element holds one copy per candidate that differs
            up to this block.
        last: last candidate of the previous forward pass; None before the first.
    """

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.hidden: list[Tensor] = [batch.hidden]
        self.last: Candidate | None = None

    @property
    def output(self) -> Tensor:
        """Output of the last block, one copy per candidate."""
        return self.hidden[-1]


class MixedBitModel:
    """Forward passes of candidates.

    Args:
        blocks: model, on the device and in the dtype of ``layer_forwards``.
        units: units of the problem.
        layer_forwards: forward functions of the quantized layers.

    Attributes:
        supports_batching: True if several candidates can run in one batch. A mixture of experts cannot: an expert
            receives tokens of all candidates, in an order of its own.
    """

    def __init__(self, blocks: BlockModel, units: Sequence[AllocationUnit], layer_forwards: LayerForwards) -> None:
        self.blocks = blocks
        self.layer_forwards = layer_forwards
        # The block after the last one holds the output head.
        self._units_of_block = [
            [u for u, unit in enumerate(units) if unit.block == index] for index in range(len(blocks) + 1)
        ]
        self._names = [unit.layers for unit in units]
        self._layers = _find_layers(blocks, units)
        self._installed: dict[str, tuple[int, ...]] = dict.fromkeys(self._layers, (FULL_PRECISION,))
        self._full: Candidate = (FULL_PRECISION,) * len(units)
        has_experts = any(blocks.expert_groups(index) for index in range(len(blocks)))
        self.supports_batching = layer_forwards.supports_mixed_bits and not has_experts

    def sort_key(self, candidate: Candidate) -> list[int]:
        """Bit-widths in the order of the blocks."""
        return [candidate[u] for units in self._units_of_block for u in units]

    def run(self, group: Sequence[Candidate], path: BlockPath) -> None:
        """Compute the block outputs of some candidates, from the first block that differs.

        Args:
            group: candidates in the order of ``sort_key``; none precedes ``path.last``.
            path: updated in place.
        """
        common = [self._common_blocks(one, other) for one, other in pairwise(group)]
        start = 0 if path.last is None else min([self._common_blocks(path.last, group[0]), *common])
        rows, length = path.batch.ids.shape
        path.hidden[:] = [hidden[-rows:] for hidden in path.hidden[: start + 1]]
        before = [0]
        for index in range(start, len(self.blocks)):
            after = divergence_points(common, index)
            entering = expand(path.hidden[-1], before, after)
            self._install([group[c] for c in after], index, rows, length)
            kwargs = path.batch.block_kwargs(len(after))[index]
            path.hidden.append(self.blocks.run_block(index, entering, kwargs))
            before = after
        path.hidden[-1] = expand(path.hidden[-1], before, range(len(group)))
        self._install(group, len(self.blocks), rows, length)
        path.last = group[-1]

    def run_full_precision(self, path: BlockPath) -> None:
        """Compute the block outputs of the full-precision model."""
        self.run([self._full], path)

    def logits(self, path: BlockPath, copies: int) -> Tensor:
        """Logits [copies * sequences, length, vocabulary] of the candidates of the last ``run``."""
        return self.blocks.head(path.batch.repeat_ids(copies), path.output)

    def full_precision_head(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits of the full-precision output head, which may be quantized in candidates."""
        self._install([self._full], len(self.blocks), *ids.shape)
        return self.blocks.head(ids, hidden)

    def restore(self) -> None:
        """Remove all quantized forward functions."""
        for index in range(len(self.blocks) + 1):
            self._install([self._full], index, 0, 0)

    def _common_blocks(self, one: Candidate, other: Candidate) -> int:
        """Number of leading blocks with equal bit-widths."""
        for index, units in enumerate(self._units_of_block[:-1]):
            if any(one[u] != other[u] for u in units):
                return index
        return len(self.blocks)

    def _install(self, group: Sequence[Candidate], index: int, sequences: int, length: int) -> None:
        """Set the bit-widths of a block's layers for consecutive candidates of ``sequences`` sequences each."""
        rows = len(group) * sequences
        for unit in self._units_of_block[index]:
            bits = tuple(candidate[unit] for candidate in group)
            wanted = bits[:1] if len(set(bits)) == 1 else (*bits, rows, length)
            for name in self._names[unit]:
                if self._installed[name] != wanted:
                    self._set_forward(name, bits, rows, length)
                    self._installed[name] = wanted

    def _set_forward(self, name: str, bits: tuple[int, ...], rows: int, length: int) -> None:
        layer = self._layers[name]
        attributes = layer.__dict__  # an instance attribute hides the class's forward
        if set(bits) == {FULL_PRECISION}:
            attributes.pop("forward", None)
            return
        runs = runs_by_bits(bits, functools.partial(self._forward_for, name))
        if len(runs) == 1:
            attributes["forward"] = runs[0][1]
        else:
            attributes["forward"] = functools.partial(forward_by_bits, runs=runs, rows=rows, length=length, name=name)

    def _forward_for(self, name: str, bits: int) -> Forward:
        layer = self._layers[name]
        if bits == FULL_PRECISION:
            return functools.partial(type(layer).forward, layer)
        return self.layer_forwards.forward_for(name, layer, bits)


def _find_layers(blocks: BlockModel, units: Sequence[AllocationUnit]) -> dict[str, nn.Linear]:
    """Layers of the units by name, the output head included."""
    wanted = {name for unit in units for name in unit.layers}
    found = {name: layer for i in range(len(blocks) + 1) for name, layer in blocks.linears(i).items()}
    return {name: layer for name, layer in found.items() if name in wanted}
