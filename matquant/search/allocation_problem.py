"""Allocation problem: units, the cost of each unit at each bit-width, and a budget in integers.

A unit is one layer, or several layers that share one bit-width. Costs and limit are integers (bits of codes, or bytes
read per token), so that a budget is kept exactly.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from matquant.errors import UserError

Candidate = tuple[int, ...]  # bit-width of each unit

FULL_PRECISION = 0  # bit-width, in a candidate, of a unit that keeps its full-precision weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """Size of one quantized layer.

    Attributes:
        name: full dotted name.
        block: index of its decoder block.
        parameters: number of weights.
        bytes_read: bytes that a runtime reads per token at each bit-width, scales included.
    """

    name: str
    block: int
    parameters: int
    bytes_read: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AllocationUnit:
    """Layers of one block that share a bit-width, and their total cost at each bit-width."""

    layers: tuple[str, ...]
    block: int
    parameters: int
    costs: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Upper bound on the cost of an allocation: average bits weighted by parameters, or bytes read per token."""

    kind: Literal["average_bits", "bytes"]
    value: Fraction

    def __str__(self) -> str:
        if self.kind == "average_bits":
            return f"{float(self.value):g} bits"
        return f"{float(self.value) / 1e9:g} GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationProblem:
    """Choice of one bit-width per unit with a bounded total cost.

    Attributes:
        bits: bit-widths to choose from, ascending.
        limit: upper bound on the sum of the units' costs.
    """

    units: tuple[AllocationUnit, ...]
    bits: tuple[int, ...]
    limit: int

    @functools.cached_property
    def equal_cost_units(self) -> list[list[int]]:
        """Indices of the units, grouped by equal costs."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, unit in enumerate(self.units):
            groups.setdefault(tuple(unit.costs[bits] for bits in self.bits), []).append(index)
        return list(groups.values())

    def uniform(self, bits: int) -> Candidate:
        """Candidate with the same bit-width in every unit."""
        return (bits,) * len(self.units)

    def cost(self, candidate: Candidate) -> int:
        """Sum of the units' costs."""
        return sum(unit.costs[bits] for unit, bits in zip(self.units, candidate, strict=True))

    def fits(self, candidate: Candidate) -> bool:
        """Return True for a candidate within the limit."""
        return self.cost(candidate) <= self.limit

    def average_bits(self, candidate: Candidate) -> float:
        """Mean bit-width, weighted by parameters."""
        total = sum(unit.parameters for unit in self.units)
        return sum(u.parameters * bits for u, bits in zip(self.units, candidate, strict=True)) / total

    def layer_bits(self, candidate: Candidate) -> dict[str, int]:
        """Bit-width of each layer by name, in the order of the units."""
        return {name: bits for unit, bits in zip(self.units, candidate, strict=True) for name in unit.layers}


def decimal_fraction(value: float) -> Fraction:
    """Exact fraction of the shortest decimal notation: 29/10 for 2.9, not the nearest binary fraction."""
    return Fraction(str(value))


def make_problem(
    layers: Sequence[LayerCost], bits: Iterable[int], budget: Budget, fused_groups: Iterable[Sequence[str]] = ()
) -> AllocationProblem:
    """Build the problem of one budget.

    Args:
        layers: layers of the parent, in the order of the model.
        bits: bit-widths to choose from.
        budget: upper bound on the cost.
        fused_groups: names of layers that share one bit-width; each layer is in at most one group.

    Raises:
        UserError: the lowest bit-width exceeds the budget.
    """
    ordered = tuple(sorted(set(bits)))
    units = tuple(_make_unit(group, ordered, budget.kind) for group in _group_layers(layers, fused_groups))
    parameters = sum(layer.parameters for layer in layers)
    limit = int(budget.value * parameters if budget.kind == "average_bits" else budget.value)  # rounded down
    problem = AllocationProblem(units=units, bits=ordered, limit=limit)
    least = problem.cost(problem.uniform(ordered[0]))
    if least > limit:
        needed = f"{least / parameters:g} bits" if budget.kind == "average_bits" else f"{least / 1e9:.6g} GB"
        raise UserError(
            f"The budget of {budget} is too small: the lowest bit-width, {ordered[0]} bits in every layer, needs {needed}. "
            "Raise search.average_bits or search.budget_gb, or add a lower bit-width to search.bits."
        )
    return problem


def _group_layers(layers: Sequence[LayerCost], fused_groups: Iterable[Sequence[str]]) -> list[list[LayerCost]]:
    group_of = {name: tuple(group) for group in fused_groups for name in group}
    groups: dict[tuple[str, ...], list[LayerCost]] = {}
    for layer in layers:
        groups.setdefault(group_of.get(layer.name, (layer.name,)), []).append(layer)
    return list(groups.values())


def _make_unit(layers: Sequence[LayerCost], bits: Sequence[int], kind: str) -> AllocationUnit:
    parameters = sum(layer.parameters for layer in layers)
    if kind == "average_bits":
        costs = {b: parameters * b for b in bits}
    else:
        costs = {b: sum(layer.bytes_read[b] for layer in layers) for b in bits}
    return AllocationUnit(
        layers=tuple(layer.name for layer in layers), block=layers[0].block, parameters=parameters, costs=costs
    )
