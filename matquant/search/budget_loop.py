"""Search under each budget, and the final selection on the whole text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matquant.search.allocation_problem import AllocationProblem, Candidate
from matquant.search.methods import SEARCH_METHODS, BudgetTask
from matquant.search.search_run import SearchRun


def search_budgets(run: SearchRun, progress: Callable[[int], None]) -> dict[str, Any]:
    """Search under each budget, ascending.

    Args:
        progress: called with 1 after the preparation and after each budget.

    Returns:
        Content of ``front.json``: ``front`` (one entry per budget), ``units`` (their losses), ``history`` (one entry
        per generation), total cost, and settings.
    """
    method = SEARCH_METHODS[run.config.method](run)
    method.prepare()
    progress(1)
    front: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    for problem, budget in zip(run.problems, run.config.ascending_budgets, strict=True):
        name = f"budget-{len(front):02d}"
        row = run.journal.load(name)
        below = tuple(front[-1]["candidate"]) if front else None
        found = method.search(BudgetTask(name=name, problem=problem, budget=budget, below=below))
        if row is None:
            row = _select(run, problem, found.candidates, front[-1] if front else None)
            row["predicted"] = _predicted_loss(method.unit_losses, row["candidate"])
            run.journal.save(name, row)
        history += [{"budget": str(budget)} | entry for entry in found.history]
        for cost in (*found.history, row["final"]):
            run.add_cost(cost)
        front.append(row)
        progress(1)
    units = [
        {"layers": list(unit.layers), "loss": {str(bits): loss for bits, loss in losses.items()}}
        for unit, losses in zip(run.problems[0].units, method.unit_losses, strict=False)  # some methods estimate none
    ]
    settings = {"fitness": run.config.fitness, "bits": sorted(run.config.bits)}
    return settings | {"units": units, "history": history} | run.cost | {"front": front}


def _select(
    run: SearchRun, problem: AllocationProblem, finalists: Sequence[Candidate], below: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Best of the finalists on the whole text, or the result of the next lower budget if that is better."""
    text = run.evaluator.all_tokens()
    losses = run.evaluator.losses(finalists, text)
    loss = min(losses)
    candidate = finalists[losses.index(loss)]
    if below is not None and below["measured"] < loss:
        candidate, loss = tuple(below["candidate"]), below["measured"]
    return {
        "candidate": list(candidate),
        "average_bits": problem.average_bits(candidate),
        "measured": loss,
        "final": {"evaluations": len(finalists), "tokens": len(finalists) * text.tokens},
    }


def _predicted_loss(unit_losses: Sequence[Mapping[int, float]], candidate: Sequence[int]) -> float | None:
    """Sum of the units' losses; None if they were not estimated."""
    if not unit_losses:
        return None
    return sum(losses[bits] for losses, bits in zip(unit_losses, candidate, strict=True))
