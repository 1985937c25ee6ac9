"""EvoPress (arXiv 2410.14649): evolution by random level switches."""

import random

from matquant.search.allocation_problem import Candidate
from matquant.search.evolution import Evolution
from matquant.search.methods.search_method import BudgetTask, Finalists, SearchMethod
from matquant.search.mutation import random_candidate, uniform_candidate
from matquant.search.proposers import RandomProposer


class EvolutionSearch(SearchMethod):
    """Evolution from a uniform candidate, or from the best of some random candidates if no uniform one meets the budget."""

    needs_unit_losses = False

    def search(self, task: BudgetTask) -> Finalists:
        """Evolve the start; the result of the last generation is final, as in EvoPress."""
        run = self.run
        evolution = Evolution(task.problem, run.evaluator, RandomProposer(), run.config, run.journal, task.name)
        found, history = evolution.run(self._start(task))
        return Finalists(candidates=[found], history=history)

    def _start(self, task: BudgetTask) -> Candidate:
        run = self.run
        if task.budget.kind == "average_bits":
            uniform = uniform_candidate(task.problem, task.budget.value)
            if uniform is not None:
                return uniform
        rng = random.Random(f"{run.config.seed} {task.name} start")
        candidates = [random_candidate(task.problem, rng) for _ in range(run.config.initial_candidates)]
        return run.best_of(f"{task.name}-start", candidates, run.config.initial_tokens)
