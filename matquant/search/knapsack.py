"""Exact minimum of a sum of unit losses under a budget: the multiple-choice knapsack problem.

Each unit takes exactly one bit-width, losses and costs are summed, and the cost may not exceed the limit. Solved by
dynamic programming over the cost if it has few distinct values (layer sizes have a large common divisor), otherwise by
SciPy's branch and bound with an optimality gap of zero.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from matquant.search.allocation_problem import AllocationProblem, Candidate

MAX_TABLE_CELLS = 2**27  # of the dynamic program, units times cost steps; one byte per cell

UnitLosses = Sequence[Mapping[int, float]]  # loss of each unit at each bit-width


def solve(problem: AllocationProblem, losses: UnitLosses, max_table_cells: int = MAX_TABLE_CELLS) -> Candidate:
    """Candidate of the least total loss within the limit; the cheapest one if several are equal.

    Args:
        problem: problem with at least one candidate within the limit.
        losses: finite loss of each unit at each bit-width.
        max_table_cells: largest table of the dynamic program; larger problems are solved by branch and bound.

    Raises:
        ValueError: no candidate fits.
    """
    costs = np.array([[unit.costs[bits] for bits in problem.bits] for unit in problem.units], dtype=np.int64)
    values = np.array([[unit[bits] for bits in problem.bits] for unit in losses], dtype=np.float64)
    extra = costs - costs.min(axis=1, keepdims=True)  # above the cheapest bit-width of each unit
    room = problem.limit - int(costs.min(axis=1).sum())
    if room < 0:
        raise ValueError("no candidate fits the budget")
    step = math.gcd(*(int(c) for c in extra.flat)) or 1
    room = min(room, int(extra.max(axis=1).sum())) // step
    solver = _dynamic_program if (room + 1) * len(problem.units) <= max_table_cells else _branch_and_bound
    return tuple(problem.bits[index] for index in solver(extra // step, values, room))


def _dynamic_program(costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    """Choices per unit. ``best[c]`` is the least loss of the units so far at a cost of exactly c."""
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
    left = int(best.argmin())  # the first minimum has the least cost
    chosen = []
    for unit in range(len(costs) - 1, -1, -1):
        chosen.append(int(choices[unit, left]))
        left -= int(costs[unit, chosen[-1]])
    return chosen[::-1]


def _branch_and_bound(costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    units, choices = costs.shape
    scale = max(room, 1)  # the solver's tolerance is relative to the budget
    one_each = csr_array(kron(eye_array(units), np.ones((1, choices))))
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
    chosen = [int(i) for i in found.x.reshape(units, choices).argmax(axis=1)]
    return _repair(chosen, costs, values, room)


def _repair(chosen: list[int], costs: NDArray[np.int64], values: NDArray[np.float64], room: int) -> list[int]:
    """Lower units, at the least loss per cost, until the exact budget is kept; the solver keeps it within a tolerance only."""
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
