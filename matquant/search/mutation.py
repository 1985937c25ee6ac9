"""Mutations of a candidate within the budget: some units get fewer bits, others more.

A level is a position in the list of bit-widths of the problem.
"""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from matquant.search.allocation_problem import AllocationProblem, Candidate

_MAX_EXCHANGES = 3  # per mutation; the minimum of two uniform draws, so that fewer are more likely
_MAX_LOWERED = 3  # units that go a level down before one goes up
_MAX_MISSES = 50  # mutations in a row without a new child

Mutation = Callable[[AllocationProblem, Candidate, random.Random], Candidate]


def switch_levels(problem: AllocationProblem, parent: Candidate, rng: random.Random) -> Candidate:
    """Level switch of EvoPress (arXiv 2410.14649): one of two units of equal cost goes a level down, the other a level up.

    With uneven levels (4 to 6 bits), as many units go down as the unit that goes up needs.
    """
    groups = problem.equal_cost_units
    child = list(parent)
    for _ in range(_number_of_exchanges(rng)):
        group = rng.choices(groups, weights=[len(g) for g in groups])[0]
        child = _exchange_level(problem, child, group, rng, fill=False)
    return tuple(child)


def trade_bits(problem: AllocationProblem, parent: Candidate, rng: random.Random) -> Candidate:
    """Exchange levels between units of any cost: one large unit that goes down can pay for several small ones."""
    child = list(parent)
    all_units = range(len(problem.units))
    for _ in range(_number_of_exchanges(rng)):
        child = _exchange_level(problem, child, all_units, rng, fill=True)
    return tuple(child)


def make_offspring(
    problem: AllocationProblem, parent: Candidate, count: int, rng: random.Random, mutate: Mutation
) -> list[Candidate]:
    """Draw up to ``count`` different children, none equal to the parent; fewer if the mutations repeat themselves."""
    found: dict[Candidate, None] = {}
    misses = 0
    while len(found) < count and misses < _MAX_MISSES:
        child = mutate(problem, parent, rng)
        misses = misses + 1 if child in found or child == parent else 0
        if child != parent:
            found[child] = None
    return list(found)


def random_candidate(problem: AllocationProblem, rng: random.Random) -> Candidate:
    """Lowest uniform bit-width at or above the budget, with random units lowered until the budget is kept."""
    count = len(problem.units)
    wide = next((b for b in problem.bits if problem.cost(problem.uniform(b)) >= problem.limit), problem.bits[-1])
    child = [wide] * count
    cost = problem.cost(tuple(child))
    while cost > problem.limit:
        unit = rng.choice([u for u in range(count) if child[u] > problem.bits[0]])
        cost -= _shift_level(problem, child, unit, -1)
    return tuple(child)


def uniform_candidate(problem: AllocationProblem, average_bits: Fraction) -> Candidate | None:
    """Uniform candidate whose bit-width equals the budget in average bits; None if there is none."""
    if average_bits.denominator == 1 and int(average_bits) in problem.bits:
        return problem.uniform(int(average_bits))
    return None


def _number_of_exchanges(rng: random.Random) -> int:
    return min(rng.randint(1, _MAX_EXCHANGES), rng.randint(1, _MAX_EXCHANGES))


def _exchange_level(
    problem: AllocationProblem, parent: list[int], group: Sequence[int], rng: random.Random, fill: bool
) -> list[int]:
    """Lower one unit of a group by a level and raise another; return the parent if no exchange fits.

    Args:
        fill: True to raise further units with probability 1/2 while the budget allows it.
    """
    child, lowered, raised = list(parent), set[int](), False
    room = problem.limit - problem.cost(tuple(parent))
    for _ in range(_MAX_LOWERED):
        down = [u for u in group if child[u] > problem.bits[0] and u not in lowered]
        if not down:
            break
        unit = rng.choice(down)
        room += _shift_level(problem, child, unit, -1)
        lowered.add(unit)
        while up := [u for u in group if u not in lowered and _cost_of_next_level(problem, child[u], u) <= room]:
            room += _shift_level(problem, child, rng.choice(up), +1)
            raised = True
            if not fill or rng.random() < 0.5:
                break
        if raised:
            return child
    return parent


def _shift_level(problem: AllocationProblem, child: list[int], unit: int, direction: int) -> int:
    """Shift a unit by one level in place; return the cost that becomes free."""
    costs, old = problem.units[unit].costs, child[unit]
    child[unit] = _neighbour(problem, old, direction)
    return costs[old] - costs[child[unit]]


def _cost_of_next_level(problem: AllocationProblem, bits: int, unit: int) -> float:
    """Additional cost of one level up; infinite at the highest level."""
    if bits == problem.bits[-1]:
        return float("inf")
    costs = problem.units[unit].costs
    return costs[_neighbour(problem, bits, +1)] - costs[bits]


def _neighbour(problem: AllocationProblem, bits: int, direction: int) -> int:
    """Bit-width one level up (+1) or down (-1)."""
    return problem.bits[problem.bits.index(bits) + direction]
