"""What a search chooses from: units, each with the price of every width, and a budget in whole numbers.

A unit is one layer, or layers that share one width because a runtime fuses them. Prices and limit are integers, bits of
codes or bytes read per token, so that a budget is kept exactly.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from matquant.errors import UserError

Candidate = tuple[int, ...]  # a width for each unit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One quantized layer.

    Attributes:
        name: full dotted name.
        block: number of its decoder block.
        parameters: weights in it.
        bytes: that a runtime reads of it per token at each width, scales included.
    """

    name: str
    block: int
    parameters: int
    bytes: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Layers of one block that have the same width, and what each width costs them together."""

    layers: tuple[str, ...]
    block: int
    parameters: int
    costs: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The most that an allocation may cost: average bits by parameters, or bytes read per token."""

    kind: Literal["average_bits", "bytes"]
    value: Fraction

    def __str__(self) -> str:
        if self.kind == "average_bits":
            return f"{float(self.value):g} bits"
        return f"{float(self.value) / 1e9:g} GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Units, the widths to choose from (ascending), and the limit on the sum of the units' costs."""

    units: tuple[Unit, ...]
    widths: tuple[int, ...]
    limit: int

    @functools.cached_property
    def equal_units(self) -> list[list[int]]:
        """Units by number, those of equal costs together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, unit in enumerate(self.units):
            groups.setdefault(tuple(unit.costs[bits] for bits in self.widths), []).append(number)
        return list(groups.values())

    def cost(self, candidate: Candidate) -> int:
        return sum(unit.costs[bits] for unit, bits in zip(self.units, candidate, strict=True))

    def fits(self, candidate: Candidate) -> bool:
        return self.cost(candidate) <= self.limit

    def average_bits(self, candidate: Candidate) -> float:
        """By parameters."""
        total = sum(unit.parameters for unit in self.units)
        return sum(u.parameters * bits for u, bits in zip(self.units, candidate, strict=True)) / total

    def layer_widths(self, candidate: Candidate) -> dict[str, int]:
        """The width of each layer by name, in the order of the units."""
        return {name: bits for unit, bits in zip(self.units, candidate, strict=True) for name in unit.layers}


def exact(value: float) -> Fraction:
    """The number that a person wrote: 2.9 and not the nearest binary fraction, so that budgets are exact."""
    return Fraction(str(value))


def make_problem(
    layers: Sequence[Layer], widths: Iterable[int], budget: Budget, fused: Iterable[Sequence[str]] = ()
) -> Problem:
    """The problem of finding a width for every layer within a budget.

    Args:
        layers: of the parent, in the order of the model.
        widths: to choose from.
        budget: never exceeded.
        fused: names of layers that share one width; each layer in one group at most.

    Raises:
        UserError: even the narrowest width exceeds the budget.
    """
    ordered = tuple(sorted(set(widths)))
    units = tuple(_unit(group, ordered, budget.kind) for group in _groups(layers, fused))
    parameters = sum(layer.parameters for layer in layers)
    limit = int(budget.value * parameters if budget.kind == "average_bits" else budget.value)  # rounded down
    problem = Problem(units=units, widths=ordered, limit=limit)
    least = problem.cost((ordered[0],) * len(units))
    if least > limit:
        needed = f"{least / parameters:g} bits" if budget.kind == "average_bits" else f"{least / 1e9:.6g} GB"
        raise UserError(
            f"A budget of {budget} cannot be kept: the narrowest width, {ordered[0]} bits in every layer, needs {needed}. "
            "Raise search.average_bits or search.gigabytes, or add a narrower width to search.widths."
        )
    return problem


def _groups(layers: Sequence[Layer], fused: Iterable[Sequence[str]]) -> list[list[Layer]]:
    group_of = {name: tuple(group) for group in fused for name in group}
    found: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault(group_of.get(layer.name, (layer.name,)), []).append(layer)
    return list(found.values())


def _unit(layers: Sequence[Layer], widths: Sequence[int], kind: str) -> Unit:
    parameters = sum(layer.parameters for layer in layers)
    if kind == "average_bits":
        costs = {bits: parameters * bits for bits in widths}
    else:
        costs = {bits: sum(layer.bytes[bits] for layer in layers) for bits in widths}
    return Unit(layers=tuple(layer.name for layer in layers), block=layers[0].block, parameters=parameters, costs=costs)
