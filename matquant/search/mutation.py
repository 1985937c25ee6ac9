"""Changes of a candidate that keep the budget: some units take fewer bits, others more."""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from matquant.search.allocation_problem import Candidate, Problem

_FLIPS = 3  # at most; fewer are likelier
_MAKE_ROOM = 3  # units that go down until one can go up
_TRIES = 50  # in a row without a new child before a generation has all there are


def switch_levels(problem: Problem, parent: Candidate, rng: random.Random) -> Candidate:
    """A level switch as in EvoPress (arXiv 2410.14649): of units of equal size one goes a level down and one up.

    Where levels are uneven (a unit goes from 4 to 6 bits), as many go down as one that goes up needs.
    """
    groups = problem.equal_units
    child = list(parent)
    for _ in range(min(rng.randint(1, _FLIPS), rng.randint(1, _FLIPS))):
        group = rng.choices(groups, weights=[len(g) for g in groups])[0]
        child = _flip(problem, child, group, rng, fill=False)
    return tuple(child)


def trade(problem: Problem, parent: Candidate, rng: random.Random) -> Candidate:
    """Like ``switch_levels`` between units of any size: a large one may pay for several small ones."""
    child = list(parent)
    everyone = range(len(problem.units))
    for _ in range(min(rng.randint(1, _FLIPS), rng.randint(1, _FLIPS))):
        child = _flip(problem, child, everyone, rng, fill=True)
    return tuple(child)


def breed(
    problem: Problem,
    parent: Candidate,
    count: int,
    rng: random.Random,
    mutate: Callable[[Problem, Candidate, random.Random], Candidate],
) -> list[Candidate]:
    """Different children, none of them the parent; fewer than ``count`` when chance finds no more."""
    found: dict[Candidate, None] = {}
    misses = 0
    while len(found) < count and misses < _TRIES:
        child = mutate(problem, parent, rng)
        misses = misses + 1 if child in found or child == parent else 0
        if child != parent:
            found[child] = None
    return list(found)


def random_start(problem: Problem, rng: random.Random) -> Candidate:
    """A uniform width that is just too wide, and random units taken down until the budget is kept."""
    count = len(problem.units)
    wide = next((b for b in problem.widths if problem.cost((b,) * count) >= problem.limit), problem.widths[-1])
    child = [wide] * count
    cost = problem.cost(tuple(child))
    while cost > problem.limit:
        unit = rng.choice([u for u in range(count) if child[u] > problem.widths[0]])
        lower = _next(problem, child[unit], -1)
        cost += problem.units[unit].costs[lower] - problem.units[unit].costs[child[unit]]
        child[unit] = lower
    return tuple(child)


def uniform_start(problem: Problem, budget: Fraction) -> Candidate | None:
    """The uniform width that meets a budget in average bits exactly, if there is one."""
    if budget.denominator == 1 and int(budget) in problem.widths:
        return (int(budget),) * len(problem.units)
    return None


def _flip(problem: Problem, parent: list[int], group: Sequence[int], rng: random.Random, fill: bool) -> list[int]:
    """One unit down a level, another up; with ``fill`` more may follow. The parent itself where that cannot be."""
    child, room, lowered = list(parent), problem.limit - problem.cost(tuple(parent)), set[int]()
    raised = False
    for _ in range(_MAKE_ROOM):
        down = [u for u in group if child[u] > problem.widths[0] and u not in lowered]
        if not down:
            break
        unit = rng.choice(down)
        room += _shift(problem, child, unit, -1)
        lowered.add(unit)
        while up := [u for u in group if u not in lowered and _price(problem, child[u], u) <= room]:
            room += _shift(problem, child, rng.choice(up), +1)
            raised = True
            if not fill or rng.random() < 0.5:
                break
        if raised:
            return child
    return parent


def _shift(problem: Problem, child: list[int], unit: int, direction: int) -> int:
    """Take a unit a level up or down in place; returns the cost that this frees."""
    costs, old = problem.units[unit].costs, child[unit]
    child[unit] = _next(problem, old, direction)
    return costs[old] - costs[child[unit]]


def _price(problem: Problem, bits: int, unit: int) -> float:
    """What a level more costs; infinite at the widest."""
    if bits == problem.widths[-1]:
        return float("inf")
    costs = problem.units[unit].costs
    return costs[_next(problem, bits, +1)] - costs[bits]


def _next(problem: Problem, bits: int, direction: int) -> int:
    return problem.widths[problem.widths.index(bits) + direction]
