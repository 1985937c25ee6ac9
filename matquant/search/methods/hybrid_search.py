"""Evolution from the knapsack's optimum, guided by a surrogate model."""

from matquant.search import knapsack
from matquant.search.allocation_problem import Candidate
from matquant.search.evolution import Evolution
from matquant.search.knapsack import UnitLosses
from matquant.search.methods.search_method import BudgetTask, Finalists, SearchMethod
from matquant.search.proposers import SurrogateProposer
from matquant.search.surrogate import Surrogate

_FORBIDDEN = 1e9  # larger than any sum of losses


class HybridSearch(SearchMethod):
    """Sensitivities as the prior of a surrogate model, knapsack, and evolution guided by the surrogate.

    All budgets share the surrogate. The evolution selects on few tokens, so its result is compared on the whole text
    with its start and with the surrogate's final optimum.
    """

    def prepare(self) -> None:
        """Estimate the loss of each unit alone and construct the surrogate."""
        super().prepare()
        self.surrogate = Surrogate(self.run.problems[0], self.unit_losses)

    def search(self, task: BudgetTask) -> Finalists:
        """Evolve the knapsack's optimum."""
        run = self.run
        start = self._start(task)
        proposer = SurrogateProposer(self.surrogate, run.config.proposals_per_offspring)
        evolution = Evolution(task.problem, run.evaluator, proposer, run.config, run.journal, task.name)
        found, history = evolution.run(start)
        optimum = knapsack.solve(task.problem, self.surrogate.unit_losses())
        return Finalists(candidates=list(dict.fromkeys([found, start, optimum])), history=history)

    def _start(self, task: BudgetTask) -> Candidate:
        """The better of the optimum and the optimum among candidates with at least the bits of the next lower budget."""
        losses = self.surrogate.unit_losses()
        optimum = knapsack.solve(task.problem, losses)
        if task.below is None:
            return optimum
        extended = knapsack.solve(task.problem, _at_least(losses, task.below))
        return self.run.best_of(f"{task.name}-start", [optimum, extended], self.run.config.tokens[-1])


def _at_least(losses: UnitLosses, floor: Candidate) -> UnitLosses:
    """Losses that forbid bit-widths below those of ``floor``."""
    return [
        {bits: loss if bits >= least else _FORBIDDEN for bits, loss in unit.items()}
        for unit, least in zip(losses, floor, strict=True)
    ]
