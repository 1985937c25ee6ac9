"""The exact optimum of a sum of losses, one per unit, under a budget: a multiple-choice knapsack.

Every unit takes exactly one width; losses add up, costs add up, and the cost may not exceed the limit. By dynamic programming
over the cost when that has few distinct values (layers' sizes have a large common divisor), else by scipy's branch and
bound, whose gap is zero.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from matquant.search.allocation_problem import Candidate, Problem

# Cells of the table (units times steps of cost): a byte each for the choices.
_LARGEST_TABLE = 2**27

Losses = Sequence[Mapping[int, float]]  # for each unit the loss at each width


def solve(problem: Problem, losses: Losses) -> Candidate:
    """The candidate of least total loss within the limit; of several the one of least cost.

    Args:
        problem: that at least one candidate fits.
        losses: finite, for each unit at each width of the problem.

    Raises:
        ValueError: no candidate fits.
    """
    costs = np.array([[unit.costs[bits] for bits in problem.widths] for unit in problem.units], dtype=np.int64)
    values = np.array([[unit[bits] for bits in problem.widths] for unit in losses], dtype=np.float64)
    extra = costs - costs.min(axis=1, keepdims=True)  # over the cheapest width of each unit
    room = problem.limit - int(costs.min(axis=1).sum())
    if room < 0:
        raise ValueError("no candidate fits the budget")
    step = math.gcd(*(int(c) for c in extra.flat)) or 1
    room = min(room, int(extra.max(axis=1).sum())) // step
    if (room + 1) * len(problem.units) <= _LARGEST_TABLE:
        chosen = _by_programming(extra // step, values, room)
    else:
        chosen = _by_branch_and_bound(extra // step, values, room)
    return tuple(problem.widths[index] for index in chosen)


def _by_programming(costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    """``best[c]`` is the least loss of the units so far at a cost of exactly c; the choices are walked back."""
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(costs), room + 1), dtype=np.uint8)
    for unit, (unit_costs, unit_values) in enumerate(zip(costs, values, strict=True)):
        after = np.full(room + 1, np.inf)
        for index, (cost, value) in enumerate(zip(unit_costs, unit_values, strict=True)):
            if cost > room:
                continue
            reached = best[: room + 1 - cost] + value
            better = reached < after[cost:]
            after[cost:][better] = reached[better]
            choices[unit, cost:][better] = index
        best = after
    left = int(best.argmin())  # the first of several: the least cost
    chosen = []
    for unit in range(len(costs) - 1, -1, -1):
        chosen.append(int(choices[unit, left]))
        left -= int(costs[unit, chosen[-1]])
    return chosen[::-1]


def _by_branch_and_bound(costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    units, widths = costs.shape
    scale = max(room, 1)  # so that the solver's tolerance is relative to the budget
    one_each = csr_array(kron(eye_array(units), np.ones((1, widths))))
    found = milp(
        values.ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.reshape(1, -1) / scale, -np.inf, room / scale),
        ],
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no candidate was found: {found.message}")
    chosen = [int(i) for i in found.x.reshape(units, widths).argmax(axis=1)]
    return _within(chosen, costs, values, room)


def _within(chosen: list[int], costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    """Mend what the solver's tolerance let through: the cheapest steps down until the budget is kept exactly."""
    chosen = list(chosen)
    while sum(int(costs[u, i]) for u, i in enumerate(chosen)) > room:
        steps = [
            ((values[u, k] - values[u, i]) / (costs[u, i] - costs[u, k]), u, k)
            for u, i in enumerate(chosen)
            for k in range(costs.shape[1])
            if costs[u, k] < costs[u, i]
        ]
        _, unit, index = min(steps)
        chosen[unit] = index
    return chosen
