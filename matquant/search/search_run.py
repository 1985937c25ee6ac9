"""State of a running search that its method, its estimators and its final selection share."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from matquant.search.allocation_problem import AllocationProblem, Candidate
from matquant.search.config import SearchConfig
from matquant.search.context import SearchContext
from matquant.search.evaluator import Evaluator
from matquant.search.journal import Journal
from matquant.search.token_sample import TokenSample


class SearchRun:
    """One running search.

    Args:
        config: settings.
        context: model, parent and text.
        problems: problem of each budget, ascending; units and bit-widths are the same in all.
        evaluator: evaluator of the losses.
        journal: record of finished steps.

    Attributes:
        cost: total ``evaluations``, ``tokens`` and ``skipped`` proposals, those of journalled steps included.
    """

    def __init__(
        self,
        config: SearchConfig,
        context: SearchContext,
        problems: Sequence[AllocationProblem],
        evaluator: Evaluator,
        journal: Journal,
    ) -> None:
        self.config = config
        self.context = context
        self.problems = problems
        self.evaluator = evaluator
        self.journal = journal
        self.cost = {"evaluations": 0, "tokens": 0, "skipped": 0}

    def add_cost(self, cost: Mapping[str, Any]) -> None:
        """Add the entries of a step that are in ``cost``."""
        for key in self.cost:
            self.cost[key] += cost.get(key, 0)

    def draw(self, name: str, tokens: int) -> TokenSample:
        """Draw a sample; it depends on the seed and the name only."""
        return self.evaluator.draw(tokens, random.Random(f"{self.config.seed} {name}"))

    def best_of(self, name: str, candidates: Sequence[Candidate], tokens: int) -> Candidate:
        """Evaluate candidates on one sample and return the one of the least loss.

        Args:
            name: name of the step, for the journal and the sample.
        """
        saved = self.journal.load(name)
        if saved is None:
            candidates = list(dict.fromkeys(candidates))
            sample = self.draw(name, tokens)
            losses = self.evaluator.losses(candidates, sample)
            saved = {
                "best": candidates[losses.index(min(losses))],
                "evaluations": len(candidates),
                "tokens": len(candidates) * sample.tokens,
            }
            self.journal.save(name, saved)
        self.add_cost(saved)
        return tuple(saved["best"])
