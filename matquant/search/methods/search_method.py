"""Base class of the search methods."""

import abc
import dataclasses
from typing import Any, ClassVar

from matquant.search.allocation_problem import AllocationProblem, Budget, Candidate
from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun
from matquant.search.sensitivity import estimate_unit_losses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetTask:
    """Search under one budget.

    Attributes:
        name: prefix of the steps in the journal.
        budget: budget of ``problem``.
        below: result of the next lower budget; None for the lowest.
    """

    name: str
    problem: AllocationProblem
    budget: Budget
    below: Candidate | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finalists:
    """Candidates that are compared on the whole text, and the history of the generations."""

    candidates: list[Candidate]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class SearchMethod(abc.ABC):
    """Search method.

    Lifecycle: ``prepare`` once, then ``search`` for each budget in ascending order. Every step is recorded in
    ``run.journal``, so that a killed search resumes. A resumed search calls the same functions with the same arguments.

    Attributes:
        needs_unit_losses: True if the method uses the loss of each unit alone.
        unit_losses: these losses; empty before ``prepare``, or if the method does not need them.
    """

    needs_unit_losses: ClassVar[bool] = True

    def __init__(self, run: SearchRun) -> None:
        self.run = run
        self.unit_losses: UnitLosses = []

    def prepare(self) -> None:
        """Estimate the loss of each unit alone, which all budgets share."""
        if self.needs_unit_losses:
            self.unit_losses = estimate_unit_losses(self.run)

    @abc.abstractmethod
    def search(self, task: BudgetTask) -> Finalists:
        """Find candidates within one budget."""
