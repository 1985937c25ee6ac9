"""Evolution of one candidate by mutation and multi-stage selection, as in EvoPress (arXiv 2410.14649).

Every stage of selection draws new tokens, more than the stage before, and keeps the children of the least loss. The
parent competes in the last stage, so that a child must beat it on the same tokens. A proposer supplies the children
(``matquant.search.proposers``).
"""

import dataclasses
import random
from typing import Any

from matquant.search.allocation_problem import AllocationProblem, Candidate
from matquant.search.config import SearchConfig
from matquant.search.evaluator import Evaluator
from matquant.search.journal import Journal
from matquant.search.proposers import CandidateLosses, Proposer

_HISTORY_KEYS = ("loss", "evaluations", "tokens", "skipped")


class Evolution:
    """Evolution under one budget.

    Args:
        problem: units and budget.
        evaluator: evaluator of the losses.
        proposer: source of the children.
        config: settings ``generations``, ``offspring``, ``survivors``, ``tokens``, ``max_tokens`` and ``seed``.
        journal: record of every generation.
        name: prefix of the generations in the journal.
    """

    def __init__(
        self,
        problem: AllocationProblem,
        evaluator: Evaluator,
        proposer: Proposer,
        config: SearchConfig,
        journal: Journal,
        name: str,
    ) -> None:
        self.problem = problem
        self.evaluator = evaluator
        self.proposer = proposer
        self.config = config
        self.journal = journal
        self.name = name

    def run(self, start: Candidate) -> tuple[Candidate, list[dict[str, Any]]]:
        """Evolve a candidate.

        Args:
            start: candidate within the budget.

        Returns:
            The fittest candidate, and one entry per generation: ``generation``, the ``loss`` of the fittest candidate
            on the last stage's tokens, the number of ``evaluations`` and ``tokens``, and the number of ``skipped``
            proposals.
        """
        parent, history, spent = start, [], 0
        for generation in range(1, self.config.generations + 1):
            if self.config.max_tokens is not None and spent >= self.config.max_tokens:
                break
            record = self._recorded_generation(parent, f"{self.name}-generation-{generation:04d}")
            parent = tuple(record["parent"])
            spent += record["tokens"]
            history.append({"generation": generation} | {key: record[key] for key in _HISTORY_KEYS})
        return parent, history

    def _recorded_generation(self, parent: Candidate, name: str) -> dict[str, Any]:
        """Run a generation, or replay it from the journal. Its random numbers depend on the seed and its name only."""
        record = self.journal.load(name)
        if record is None:
            record = self._generation(parent, random.Random(f"{self.config.seed} {name}"))
            self.journal.save(name, record)
        else:
            for saved in record["measurements"]:
                self.proposer.learn(CandidateLosses.from_json(saved))
        return record

    def _generation(self, parent: Candidate, rng: random.Random) -> dict[str, Any]:
        cost_before, skipped_before = dataclasses.replace(self.evaluator.cost), self.proposer.skipped
        children = self.proposer.propose(self.problem, parent, self.config.offspring, rng)
        measurements, loss = [], 0.0
        stages = len(self.config.tokens)
        for stage, (survivors, tokens) in enumerate(zip(self.config.survivors, self.config.tokens, strict=True), 1):
            measured = self._measure(parent, children, tokens, rng, is_last=stage == stages)
            measurements.append(measured)
            self.proposer.learn(measured)
            # The parent is the first candidate. It competes in the last stage only, and wins if losses are equal.
            first = int(measured.with_parent and stage < stages)
            ranks = range(first, len(measured.candidates))
            best = sorted(ranks, key=measured.losses.__getitem__)[:survivors]
            children = [measured.candidates[i] for i in best]
            loss = measured.losses[best[0]] if best else loss
        return {
            "parent": list(children[0]),
            "loss": loss,
            "evaluations": self.evaluator.cost.evaluations - cost_before.evaluations,
            "tokens": self.evaluator.cost.tokens - cost_before.tokens,
            "skipped": self.proposer.skipped - skipped_before,
            "measurements": [dataclasses.asdict(measured) for measured in measurements],
        }

    def _measure(
        self, parent: Candidate, children: list[Candidate], tokens: int, rng: random.Random, *, is_last: bool
    ) -> CandidateLosses:
        """Evaluate the children of one stage on new tokens, with the parent if the stage or the proposer needs it."""
        with_parent = is_last or self.proposer.measures_parent
        sample = self.evaluator.draw(tokens, rng)
        candidates = [parent] * with_parent + children
        losses = self.evaluator.losses(candidates, sample)
        return CandidateLosses(
            candidates=tuple(candidates), losses=tuple(losses), tokens=sample.tokens, with_parent=with_parent
        )
