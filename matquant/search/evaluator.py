"""The loss of candidates on some text, with one model in memory whose layers change width in place.

What makes it fast:
  - a layer changes width by taking another tensor, which is decoded once and kept within a memory limit, or by reading
    another number of bit planes (``matquant.search.slices``);
  - candidates are put in order so that neighbours agree on their first blocks, and what leaves those blocks is computed once;
  - of the full-precision model only what leaves its last block is kept (exact, and small whatever the vocabulary), or
    its k likeliest tokens.

Lifecycle:
  1. ``open`` puts the model on the device and follows the full-precision model through the text once;
  2. ``losses`` any number of times;
  3. when the context ends, the model has its own weights again.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from matquant.models.blocks import BlockModel
from matquant.models.calls import Calls
from matquant.ranks import ALONE, Ranks
from matquant.search.problem import Candidate, Unit
from matquant.search.slices import Slices

Fitness = Literal["kl", "sparse_kl", "perplexity"]
FULL = 0  # the "width" of a layer that is left in full precision


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
        ranks: Ranks = ALONE,
    ) -> None:
        self.blocks = blocks
        self.slices = slices
        self.windows = windows
        self.batch_size = batch_size
        self.fitness = fitness
        self.top_k = top_k
        self.device = device
        self.ranks = ranks
        self.counts = Counts()
        self._layers = _layers_of_blocks(blocks, units)
        self._units_of_block = [
            [u for u, unit in enumerate(units) if unit.block == index] for index in range(len(blocks) + 1)
        ]
        self._names = [unit.layers for unit in units]
        self._own = {name: layer.weight for name, layer in self._layers.items()}
        self._installed = dict.fromkeys(self._layers, FULL)
        self._full: Candidate = (FULL,) * len(units)
        self._targets: list[Tensor | tuple[Tensor, Tensor]] = []
        if fitness != "perplexity":
            self._targets = [target for batch in self._batches(self.everything()) for target in self._follow(batch)]

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
        order = sorted(range(len(candidates)), key=lambda c: self._key(candidates[c]))
        order = order[self._share(len(order), self.ranks.rank) : self._share(len(order), self.ranks.rank + 1)]
        sums = torch.zeros(len(candidates), dtype=torch.float64)
        predicted = 0
        for numbers, length in self._batches(sample):
            predicted += len(numbers) * (length - 1)
            if not order:
                continue
            ids = self.windows[numbers, :length].to(self.device)
            hidden, calls = self.blocks.prepare(ids)
            score = self._scorer(ids, numbers, length)
            path: list[Tensor] = [hidden]
            last: Candidate | None = None
            for c in order:
                self._run(candidates[c], last, path, calls)
                last = candidates[c]
                sums[c] += score(self.blocks.head(ids, path[-1]))
        self.ranks.add(sums)
        self.counts.evaluations += len(candidates)
        self.counts.tokens += len(candidates) * self.size(sample)
        return (sums / predicted).tolist()

    def _share(self, candidates: int, rank: int) -> int:
        """Where a process's part of the candidates begins."""
        return rank * candidates // self.ranks.count

    # A candidate's forward pass

    def _key(self, candidate: Candidate) -> list[int]:
        """Candidates in this order share first blocks with their neighbours as far as they can."""
        return [candidate[u] for units in self._units_of_block for u in units]

    def _run(self, candidate: Candidate, last: Candidate | None, path: list[Tensor], calls: Calls) -> None:
        """Make ``path`` what enters block 0 and leaves each block for this candidate, from what it was for ``last``."""
        start = 0 if last is None else self._common_blocks(candidate, last)
        del path[start + 1 :]
        for index in range(start, len(self.blocks)):
            self._install(candidate, index)
            path.append(self.blocks.run_block(index, path[-1], calls[index]))
        self._install(candidate, len(self.blocks))

    def _common_blocks(self, one: Candidate, other: Candidate) -> int:
        """How many first blocks have the same widths in both."""
        for index, units in enumerate(self._units_of_block[:-1]):
            if any(one[u] != other[u] for u in units):
                return index
        return len(self.blocks)

    def _install(self, candidate: Candidate, index: int) -> None:
        """Give the layers of a block the candidate's widths."""
        for unit in self._units_of_block[index]:
            bits = candidate[unit]
            for name in self._names[unit]:
                if self._installed[name] == bits:
                    continue
                if bits == FULL:
                    self.slices.remove(name, self._layers[name], self._own[name])
                else:
                    self.slices.install(name, self._layers[name], bits)
                self._installed[name] = bits

    def restore(self) -> None:
        """Give every layer its own weight again."""
        for index in range(len(self.blocks) + 1):
            self._install(self._full, index)

    # Targets and scores

    def _batches(self, sample: Sample) -> Iterator[tuple[list[int], int]]:
        """Numbers of windows and the length they are cut to."""
        whole = list(sample.windows if sample.last == self.windows.shape[1] else sample.windows[:-1])
        for start in range(0, len(whole), self.batch_size):
            yield whole[start : start + self.batch_size], self.windows.shape[1]
        if len(whole) < len(sample.windows):
            yield [sample.windows[-1]], sample.last

    @torch.no_grad()
    def _follow(self, batch: tuple[list[int], int]) -> list[Tensor | tuple[Tensor, Tensor]]:
        """What is kept of the full-precision model for each window of a batch."""
        ids = self.windows[batch[0]].to(self.device)
        hidden, calls = self.blocks.prepare(ids)
        path = [hidden]
        self._run(self._full, None, path, calls)
        if self.fitness == "kl":
            return list(path[-1].to("cpu"))
        logits = self.blocks.head(ids, path[-1]).float()
        values, tokens = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        return list(zip(values.log_softmax(-1).cpu(), tokens.to(torch.int32).cpu(), strict=True))

    def _scorer(self, ids: Tensor, numbers: Sequence[int], length: int) -> Callable[[Tensor], float]:
        """A function from logits [batch, length, vocabulary] to the sum of the loss over the predicted tokens."""
        if self.fitness == "perplexity":
            return lambda logits: _nll(logits[:, :-1], ids[:, 1:])
        kept = [self._targets[n] for n in numbers]
        if self.fitness == "kl":
            self._install(self._full, len(self.blocks))  # the head may be quantized too
            hidden = torch.stack([k for k in kept if isinstance(k, Tensor)])[:, :length].to(self.device)
            full = self.blocks.head(ids, hidden)[:, :-1].float().log_softmax(-1)
            expected = full.exp()
            entropy = (expected * full).sum(dtype=torch.float64)
            return lambda logits: _kl(logits[:, :-1], expected, entropy)
        values = torch.stack([k[0] for k in kept])[:, : length - 1].to(self.device)
        tokens = torch.stack([k[1] for k in kept])[:, : length - 1].to(self.device, torch.int64)
        probabilities = values.exp()
        entropy = (probabilities * values).sum(dtype=torch.float64)
        return lambda logits: _kl(logits[:, :-1].gather(-1, tokens), probabilities, entropy)


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
    ranks: Ranks = ALONE,
) -> Iterator[Evaluator]:
    """An evaluator whose model is on ``device`` in the slices' dtype; the model is as before afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocks.outside_on_device(device, slices.dtype))
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
            ranks=ranks,
        )
        stack.callback(evaluator.restore)
        yield evaluator


def _layers_of_blocks(blocks: BlockModel, units: Sequence[Unit]) -> dict[str, nn.Linear]:
    """The units' layers by name, the head among them."""
    wanted = {name for unit in units for name in unit.layers}
    found = {name: layer for i in range(len(blocks) + 1) for name, layer in blocks.linears(i).items()}
    return {name: layer for name, layer in found.items() if name in wanted}


def _nll(logits: Tensor, targets: Tensor) -> float:
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return float(loss)


def _kl(logits: Tensor, expected: Tensor, entropy: Tensor) -> float:
    """Sum over tokens of KL(expected || softmax(logits)); ``entropy`` is the sum of p log p.

    As p log p - p z + log sum exp z: one exponential and one product for each logit, where comparing two distributions
    term by term takes several. Rounding is some 1e-6 nats a token, far below the differences that a search looks for.
    """
    logits = logits.float()
    cross = torch.linalg.vecdot(expected, logits).sum(dtype=torch.float64)
    return float(entropy - cross + logits.logsumexp(-1).sum(dtype=torch.float64))
