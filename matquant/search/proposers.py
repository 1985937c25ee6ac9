"""Proposers of a generation's children: random mutations, or a selection from them by a surrogate model."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matquant.search import knapsack
from matquant.search.allocation_problem import AllocationProblem, Candidate
from matquant.search.mutation import make_offspring, switch_levels, trade_bits
from matquant.search.surrogate import Surrogate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CandidateLosses:
    """Losses of candidates on the same tokens.

    Attributes:
        losses: loss of each candidate.
        tokens: number of tokens.
        with_parent: True if the first candidate is the parent.
    """

    candidates: tuple[Candidate, ...]
    losses: tuple[float, ...]
    tokens: int
    with_parent: bool

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "CandidateLosses":
        """Inverse of ``dataclasses.asdict`` after JSON, which has no tuples."""
        candidates: Sequence[Sequence[int]] = saved["candidates"]
        return cls(
            candidates=tuple(tuple(c) for c in candidates),
            losses=tuple(saved["losses"]),
            tokens=saved["tokens"],
            with_parent=saved["with_parent"],
        )


class Proposer(Protocol):
    """Source of a generation's children.

    Attributes:
        skipped: number of proposals that were not evaluated.
    """

    skipped: int

    @property
    def measures_parent(self) -> bool:
        """True if every stage must evaluate the parent too."""
        ...

    def propose(self, problem: AllocationProblem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]:
        """Propose up to ``count`` children within the budget."""
        ...

    def learn(self, measured: CandidateLosses) -> None:
        """Take the losses of one stage into account."""
        ...


class RandomProposer:
    """Random level switches between units of equal cost, as in EvoPress (arXiv 2410.14649)."""

    skipped = 0
    measures_parent = False

    def propose(self, problem: AllocationProblem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]:
        """Draw level switches of the parent."""
        return make_offspring(problem, parent, count, rng, switch_levels)

    def learn(self, measured: CandidateLosses) -> None:
        """Ignore the losses."""


class SurrogateProposer:
    """The most promising of many random children by a surrogate model, and the surrogate's own optimum.

    Args:
        surrogate: model that all budgets of a search share.
        proposals_per_offspring: number of random children for each one that is evaluated.
    """

    measures_parent = True

    def __init__(self, surrogate: Surrogate, proposals_per_offspring: int) -> None:
        self.surrogate = surrogate
        self.proposals_per_offspring = proposals_per_offspring
        self.skipped = 0

    def propose(self, problem: AllocationProblem, parent: Candidate, count: int, rng: random.Random) -> list[Candidate]:
        """Select the children of the least lower confidence bound (mean minus standard deviation) on the loss."""
        half = count * self.proposals_per_offspring // 2
        optimum = knapsack.solve(problem, self.surrogate.unit_losses())
        pool = [
            optimum,
            *make_offspring(problem, parent, half, rng, switch_levels),
            *make_offspring(problem, parent, half, rng, trade_bits),
        ]
        pool = [child for child in dict.fromkeys(pool) if child != parent]
        if not pool:
            return []
        mean, deviation = self.surrogate.predict(parent, pool)
        best = (mean - deviation).argsort(stable=True)[:count].tolist()
        self.skipped += len(pool) - len(best)
        return [pool[i] for i in best]

    def learn(self, measured: CandidateLosses) -> None:
        """Update the surrogate with the losses relative to the parent's."""
        if measured.with_parent:
            (parent, *children), (loss, *losses) = measured.candidates, measured.losses
            differences = [found - loss for found in losses]
            self.surrogate.observe(parent, children, differences, loss, measured.tokens)
