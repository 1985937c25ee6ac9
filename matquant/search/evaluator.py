"""The loss of candidates on some text, with one model in memory whose layers change width in place.

What makes it fast:
  - a layer changes width by taking another tensor, which is decoded once and kept within a memory limit, or by reading
    another number of bit planes (``matquant.search.layer_forwards``);
  - candidates are put in order so that neighbours agree on their first blocks, and what leaves those blocks is computed once;
  - as many of them as a batch has room for go through the model together (``matquant.search.candidate_batching``);
  - of the full-precision model only what leaves its last block is kept (exact, and small whatever the vocabulary), or
    its k likeliest tokens;
  - losses are added up on the device, which is waited for once they are all under way.

Lifecycle:
  1. ``open`` puts the model on the device and follows the full-precision model through the text once;
  2. ``losses`` any number of times;
  3. when the context ends, the model has its own weights again.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.models.blocks import BlockModel
from matquant.search.allocation_problem import Candidate, Unit
from matquant.search.candidate_batching import Forward, Text, branches, by_width, forward_by_width, spread
from matquant.search.fitness import Fitness, Score, kl_score, likeliest, likelihood_score, sparse_kl_score
from matquant.search.layer_forwards import Slices

FULL = 0  # the "width" of a layer that is left in full precision

# Of a GPU's free memory what is kept of the full-precision model may take this share; more stays in the host's.
_SHARE_OF_MEMORY = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Some tokens of the text: windows by number, the last of them cut to ``last`` tokens."""

    windows: tuple[int, ...]
    last: int


@dataclasses.dataclass(slots=True)
class Counts:
    """What a search spent: candidates measured, and tokens that they were measured on, together."""

    evaluations: int = 0
    tokens: int = 0


class Evaluator:
    """Measures candidates. Made by ``open``.

    Attributes:
        batch_size: windows that go through the model at a time, all candidates' together.
        counts: of all calls of ``losses``.
        windows: int64 [sequences, length], the text.
    """

    def __init__(
        self,
        blocks: BlockModel,
        units: Sequence[Unit],
        slices: Slices,
        windows: Tensor,
        *,
        batch_size: int,
        fitness: Fitness,
        top_k: int,
        device: torch.device,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.blocks = blocks
        self.slices = slices
        self.windows = windows
        self.batch_size = batch_size
        self.fitness = fitness
        self.top_k = top_k
        self.device = device
        self.process_group = process_group
        self.counts = Counts()
        self._layers = _layers_of_blocks(blocks, units)
        self._units_of_block = [
            [u for u, unit in enumerate(units) if unit.block == index] for index in range(len(blocks) + 1)
        ]
        self._names = [unit.layers for unit in units]
        self._installed: dict[str, tuple[int, ...]] = dict.fromkeys(self._layers, (FULL,))
        self._full: Candidate = (FULL,) * len(units)
        # An expert sees tokens of any candidate, in an order of its own.
        self._together = slices.mixes and not any(blocks.expert_groups(index) for index in range(len(blocks)))
        self._targets: tuple[Tensor, ...] = ()
        if fitness != "perplexity":
            kept = [self._follow(numbers) for numbers, _ in self._batches(self.everything())]
            self._targets = tuple(self._placed(torch.cat(parts)) for parts in zip(*kept, strict=True))

    def everything(self) -> Sample:
        """All of the text."""
        return Sample(windows=tuple(range(len(self.windows))), last=self.windows.shape[1])

    def draw(self, tokens: int, rng: random.Random) -> Sample:
        """Windows drawn without replacement until they hold ``tokens`` tokens, the last one cut; all if there are fewer."""
        count, length = self.windows.shape
        needed = min(-(-tokens // length), count)
        last = min(tokens - (needed - 1) * length, length)
        return Sample(windows=tuple(sorted(rng.sample(range(count), needed))), last=max(last, 2))

    def size(self, sample: Sample) -> int:
        """Tokens in a sample."""
        return (len(sample.windows) - 1) * self.windows.shape[1] + sample.last

    @torch.no_grad()
    def losses(self, candidates: Sequence[Candidate], sample: Sample) -> list[float]:
        """The mean loss over the predicted tokens of a sample, for each candidate.

        Several processes share the candidates; what one of them finds for a candidate does not depend on the others.

        Args:
            candidates: a width, or ``FULL``, for each unit.
            sample: of the text.

        Returns:
            KL(full || candidate), or that over the full model's likeliest tokens, in nats a token; for ``perplexity`` the
            mean negative log-likelihood, which puts candidates in the same order.
        """
        passes = self._passes(candidates, min(self.batch_size, len(sample.windows)))
        passes = passes[
            self._share(len(passes), self.process_group.rank) : self._share(len(passes), self.process_group.rank + 1)
        ]
        sums = torch.zeros(len(candidates), dtype=torch.float64, device=self.device)
        predicted = 0
        for numbers, length in self._batches(sample):
            predicted += len(numbers) * (length - 1)
            if passes:
                self._measure(candidates, passes, numbers, length, sums)
        self.process_group.all_reduce(sums)
        self.counts.evaluations += len(candidates)
        self.counts.tokens += len(candidates) * self.size(sample)
        return (sums / predicted).tolist()

    def _passes(self, candidates: Sequence[Candidate], windows: int) -> list[list[int]]:
        """Numbers of the candidates that go through the model together, on so many windows each.

        They do not depend on the number of processes, so that it has no influence on what is found.
        """
        order = sorted(range(len(candidates)), key=lambda c: self._key(candidates[c]))
        size = max(1, self.batch_size // windows) if self._together else 1
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _share(self, passes: int, rank: int) -> int:
        """Where a process's part of the passes begins."""
        return rank * passes // self.process_group.world_size

    def _measure(
        self,
        candidates: Sequence[Candidate],
        passes: Sequence[Sequence[int]],
        numbers: Sequence[int],
        length: int,
        sums: Tensor,
    ) -> None:
        """Add the loss on some windows, cut to ``length``, to ``sums``, float64 [candidates]; waits for no result."""
        text = Text(self.blocks, self.windows[numbers, :length].to(self.device))
        score = self._score(text.ids, numbers, length)
        path, last = [text.hidden], None
        for together in passes:
            group = [candidates[c] for c in together]
            self._run(group, last, path, text)
            last = group[-1]
            logits = self.blocks.head(text.copies(len(group)), path[-1])
            for c, own in zip(together, logits.split(len(numbers)), strict=True):
                sums[c] += score(own[:, :-1])

    # A candidate's forward pass

    def _key(self, candidate: Candidate) -> list[int]:
        """Candidates in this order share first blocks with their neighbours as far as they can."""
        return [candidate[u] for units in self._units_of_block for u in units]

    def _run(self, group: Sequence[Candidate], last: Candidate | None, path: list[Tensor], text: Text) -> None:
        """Make ``path`` what enters block 0 and leaves each block for these candidates, from what it was up to ``last``.

        Args:
            group: in the order of ``_key``, as ``last`` is before them.
            path: each element has the windows of the candidates that differ up to there, one candidate after the other.
        """
        alike = [self._common_blocks(one, other) for one, other in pairwise(group)]
        start = 0 if last is None else min([self._common_blocks(last, group[0]), *alike])
        rows, length = text.ids.shape
        path[:] = [hidden[-rows:] for hidden in path[: start + 1]]
        before = [0]
        for index in range(start, len(self.blocks)):
            after = branches(alike, index)
            entering = spread(path[-1], before, after)
            self._install([group[number] for number in after], index, rows, length)
            path.append(self.blocks.run_block(index, entering, text.calls(len(after))[index]))
            before = after
        path[-1] = spread(path[-1], before, range(len(group)))
        self._install(group, len(self.blocks), rows, length)

    def _common_blocks(self, one: Candidate, other: Candidate) -> int:
        """How many first blocks have the same widths in both."""
        for index, units in enumerate(self._units_of_block[:-1]):
            if any(one[u] != other[u] for u in units):
                return index
        return len(self.blocks)

    def _install(self, group: Sequence[Candidate], index: int, rows: int, length: int) -> None:
        """Give the layers of a block the widths of candidates that follow each other, ``rows`` windows each."""
        for unit in self._units_of_block[index]:
            widths = tuple(candidate[unit] for candidate in group)
            shape = (len(group) * rows, length)
            wanted = widths[:1] if len(set(widths)) == 1 else widths + shape
            for name in self._names[unit]:
                if self._installed[name] != wanted:
                    self._set_forward(name, widths, *shape)
                    self._installed[name] = wanted

    def _set_forward(self, name: str, widths: tuple[int, ...], rows: int, length: int) -> None:
        layer = self._layers[name]
        own = layer.__dict__
        if set(widths) == {FULL}:
            own.pop("forward", None)
            return
        runs = by_width(widths, functools.partial(self._serve, name))
        if len(runs) == 1:
            own["forward"] = runs[0][1]
        else:
            own["forward"] = functools.partial(forward_by_width, runs=runs, rows=rows, length=length, name=name)

    def _serve(self, name: str, bits: int) -> Forward:
        layer = self._layers[name]
        return functools.partial(type(layer).forward, layer) if bits == FULL else self.slices.serve(name, layer, bits)

    def restore(self) -> None:
        """Give every layer its own weight again."""
        for index in range(len(self.blocks) + 1):
            self._install([self._full], index, 0, 0)

    # Targets and scores

    def _batches(self, sample: Sample) -> Iterator[tuple[list[int], int]]:
        """Numbers of windows and the length they are cut to."""
        whole = list(sample.windows if sample.last == self.windows.shape[1] else sample.windows[:-1])
        for start in range(0, len(whole), self.batch_size):
            yield whole[start : start + self.batch_size], self.windows.shape[1]
        if len(whole) < len(sample.windows):
            yield [sample.windows[-1]], sample.last

    @torch.no_grad()
    def _follow(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """What is kept of the full-precision model on some windows."""
        text = Text(self.blocks, self.windows[numbers].to(self.device))
        path = [text.hidden]
        self._run([self._full], None, path, text)
        if self.fitness == "kl":
            return (path[-1].cpu(),)
        shares, tokens = likeliest(self.blocks.head(text.ids, path[-1]), self.top_k)
        return shares.cpu(), tokens.cpu()

    def _placed(self, target: Tensor) -> Tensor:
        """On the device if it has room, else in the host's memory."""
        roomy = (
            self.device.type == "cuda" and target.nbytes <= _SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.device)[0]
        )
        return target.to(self.device) if roomy else target

    def _score(self, ids: Tensor, numbers: Sequence[int], length: int) -> Score:
        """How the logits of the predicted tokens of some windows are judged."""
        if self.fitness == "perplexity":
            return likelihood_score(ids)
        kept = [target[numbers, :length].to(self.device) for target in self._targets]
        if self.fitness == "kl":
            self._install([self._full], len(self.blocks), *ids.shape)  # the head may be quantized too
            return kl_score(self.blocks.head(ids, kept[0])[:, :-1])
        return sparse_kl_score(kept[0][:, :-1], kept[1][:, :-1])


@contextlib.contextmanager
def open_evaluator(
    blocks: BlockModel,
    units: Sequence[Unit],
    slices: Slices,
    windows: Tensor,
    *,
    batch_size: int,
    fitness: Fitness,
    top_k: int,
    device: torch.device,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Evaluator]:
    """An evaluator whose model is on ``device`` in the slices' dtype; the model is as before afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocks.head_on_device(device, slices.dtype))
        for index in range(len(blocks)):
            stack.enter_context(blocks.on_device(index, device, slices.dtype))
        evaluator = Evaluator(
            blocks,
            units,
            slices,
            windows,
            batch_size=batch_size,
            fitness=fitness,
            top_k=top_k,
            device=device,
            process_group=process_group,
        )
        stack.callback(evaluator.restore)
        yield evaluator


def _layers_of_blocks(blocks: BlockModel, units: Sequence[Unit]) -> dict[str, nn.Linear]:
    """The units' layers by name, the head among them."""
    wanted = {name for unit in units for name in unit.layers}
    found = {name: layer for i in range(len(blocks) + 1) for name, layer in blocks.linears(i).items()}
    return {name: layer for name, layer in found.items() if name in wanted}
