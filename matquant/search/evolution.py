"""Evolution of one candidate: children are proposed, measured on more and more tokens, and the fittest takes over.

Selection is that of EvoPress (arXiv 2410.14649): every stage measures on tokens drawn anew and keeps the best; the parent
takes part in the last stage, so that a child must beat it on the same tokens. What differs between methods is who
proposes the children: chance alone (``Chance``), or a surrogate that picks the most promising of many (``Guided``).
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matquant.search import knapsack
from matquant.search.allocation_problem import Candidate, Problem
from matquant.search.evaluator import Evaluator
from matquant.search.mutation import breed, switch_levels, trade
from matquant.search.surrogate import Surrogate


class Journal(Protocol):
    """Keeps what was finished, so that a killed search goes on from there."""

    def load(self, name: str) -> Any | None: ...

    def save(self, name: str, value: Any) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """How a generation is selected from: ``survivors`` of each stage, the last one alone, measured on ``tokens``."""

    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Losses of candidates on the same tokens; the first candidate is the parent where ``with_parent``."""

    candidates: tuple[Candidate, ...]
    losses: tuple[float, ...]
    tokens: int
    with_parent: bool


class Proposer(Protocol):
    """Who proposes a generation's children, and learns from what they turn out to be."""

    skipped: int  # proposals that were never measured

    def propose(self, problem: Problem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]: ...

    def learn(self, measurement: Measurement) -> None: ...

    @property
    def compares(self) -> bool:
        """Whether every stage should measure the parent too."""
        ...


class Chance:
    """Random level switches within units of equal size, as EvoPress proposes them."""

    skipped = 0
    compares = False

    def propose(self, problem: Problem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]:
        return breed(problem, parent, count, rng, switch_levels)

    def learn(self, measurement: Measurement) -> None:
        pass


class Guided:
    """The most promising of many random children, and the optimum of what the surrogate believes.

    Args:
        surrogate: shared by several searches if they are to learn from each other.
        proposals: children for each one that is measured.
    """

    compares = True

    def __init__(self, surrogate: Surrogate, proposals: int) -> None:
        self.surrogate = surrogate
        self.proposals = proposals
        self.skipped = 0

    def propose(self, problem: Problem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]:
        half = count * self.proposals // 2
        pool = breed(problem, parent, half, rng, switch_levels) + breed(problem, parent, half, rng, trade)
        pool = list(dict.fromkeys([knapsack.solve(problem, self.surrogate.losses()), *pool]))
        pool = [child for child in pool if child != parent]
        if not pool:
            return []
        mean, deviation = self.surrogate.predict(parent, pool)
        best = (mean - deviation).argsort(stable=True)[:count].tolist()
        self.skipped += len(pool) - len(best)
        return [pool[i] for i in best]

    def learn(self, measurement: Measurement) -> None:
        if measurement.with_parent:
            (parent, *children), (loss, *losses) = measurement.candidates, measurement.losses
            differences = [found - loss for found in losses]
            self.surrogate.observe(parent, children, differences, loss, measurement.tokens)


def evolve(
    problem: Problem,
    evaluator: Evaluator,
    start: Candidate,
    proposer: Proposer,
    selection: Selection,
    *,
    generations: int,
    max_tokens: int | None,
    seed: str,
    journal: Journal,
    name: str,
) -> tuple[Candidate, list[dict[str, Any]]]:
    """The fittest candidate after some generations.

    Args:
        start: keeps the budget.
        generations: at most.
        max_tokens: measured by all candidates together, after which no generation begins.
        seed: each generation draws from it and its own number, so that a resumed search is the same search.
        journal: keeps each generation.
        name: of this search in the journal.

    Returns:
        The candidate, and for each generation its number, the ``loss`` of the fittest on the last stage's tokens, the
        ``evaluations`` and ``tokens`` that the generation took, and how many proposals were ``skipped``.
    """
    parent, history, spent = start, [], 0
    for generation in range(1, generations + 1):
        if max_tokens is not None and spent >= max_tokens:
            break
        key = f"{name}-generation-{generation:04d}"
        record = journal.load(key)
        if record is None:
            rng = random.Random(f"{seed} {key}")
            record = _generation(problem, evaluator, parent, proposer, selection, rng)
            journal.save(key, record)
        else:
            for measured in record["measurements"]:
                proposer.learn(_measurement(measured))
        parent = tuple(record["parent"])
        spent += record["tokens"]
        history.append({"generation": generation} | {k: record[k] for k in _HISTORY})
    return parent, history


_HISTORY = ("loss", "evaluations", "tokens", "skipped")


def _generation(
    problem: Problem,
    evaluator: Evaluator,
    parent: Candidate,
    proposer: Proposer,
    selection: Selection,
    rng: random.Random,
) -> dict[str, Any]:
    before, skipped = dataclasses.replace(evaluator.counts), proposer.skipped
    children = proposer.propose(problem, parent, selection.offspring, rng)
    measurements, loss = [], 0.0
    for stage, (survivors, tokens) in enumerate(zip(selection.survivors, selection.tokens, strict=True)):
        last = stage + 1 == len(selection.tokens)
        compared = last or proposer.compares
        sample = evaluator.draw(tokens, rng)
        candidates = [parent] * compared + children
        losses = evaluator.losses(candidates, sample)
        measurements.append(
            Measurement(
                candidates=tuple(candidates), losses=tuple(losses), tokens=evaluator.size(sample), with_parent=compared
            )
        )
        proposer.learn(measurements[-1])
        skip = int(compared and not last)  # before the last stage the parent does not compete
        best = sorted(range(skip, len(candidates)), key=losses.__getitem__)[:survivors]  # of equals the parent
        children = [candidates[i] for i in best]
        loss = losses[best[0]] if best else loss
    after = evaluator.counts
    return {
        "parent": list(children[0]),
        "loss": loss,
        "evaluations": after.evaluations - before.evaluations,
        "tokens": after.tokens - before.tokens,
        "skipped": proposer.skipped - skipped,
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }


def _measurement(saved: Mapping[str, Any]) -> Measurement:
    candidates: Sequence[Sequence[int]] = saved["candidates"]
    return Measurement(
        candidates=tuple(tuple(c) for c in candidates),
        losses=tuple(saved["losses"]),
        tokens=saved["tokens"],
        with_parent=saved["with_parent"],
    )
