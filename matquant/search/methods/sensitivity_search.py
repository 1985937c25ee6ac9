"""Optimum of the sum of the units' losses."""

from matquant.search import knapsack
from matquant.search.methods.search_method import BudgetTask, Finalists, SearchMethod


class SensitivitySearch(SearchMethod):
    """Loss of each unit alone, and the exact optimum of their sum under the budget (multiple-choice knapsack)."""

    def search(self, task: BudgetTask) -> Finalists:
        """Solve the knapsack."""
        return Finalists(candidates=[knapsack.solve(task.problem, self.unit_losses)])
