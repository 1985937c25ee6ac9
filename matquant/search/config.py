"""Settings of the search, and their checks."""

import dataclasses
from collections.abc import Collection
from typing import Literal

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS, MAX_BITS, MIN_BITS
from matquant.search.allocation_problem import Budget, decimal_fraction

NO_SEARCH = "none"  # value of ``method`` for uniform slices only

# Settings that had another name before.
RENAMED = {
    "search.ladder": "search.budgets",
    "search.gigabytes": "search.budget_gb",
    "search.widths": "search.bits",
    "search.fused": "search.fuse_shared_inputs",
    "search.initial": "search.initial_candidates",
    "search.proposals": "search.proposals_per_offspring",
    "search.serve": "search.layer_forward",
    "search.cache_gigabytes": "search.cache_gb",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Budget, method and text of a search for a bit-width per layer.

    A search needs exactly one of ``average_bits``, ``budget_gb`` and ``budgets``.

    Attributes:
        name: name of the preset.
        method: ``none``, or a key of ``SEARCH_METHODS``.
        average_bits: budget in average bits, weighted by the parameters of the quantized layers.
        budget_gb: budget in 10^9 bytes that a runtime reads per token for the quantized layers, scales included.
        budgets: several budgets in average bits.
        bits: bit-widths to choose from.
        fuse_shared_inputs: one bit-width for layers with the same input (q, k, v; gate, up). The stock formats gptq and
            compressed_tensors store these layers with one bit-width, because their runtimes fuse them. Transformers and
            the vLLM plugin of this project read each layer at its own bit-width.
        fitness: key of ``FITNESS_FUNCTIONS``.
        top_k: number of tokens for the fitness ``sparse_kl``.
        sensitivity: key of ``SENSITIVITY_ESTIMATORS``. ``measured``: loss of each layer alone at every bit-width.
            ``shared``: its share in the loss of the uniform slices, measured at the bit-widths next to the budget.
            ``error``: second-order error from the parent, without evaluations.
        sensitivity_tokens: tokens for each evaluation of the sensitivity.
        generations: largest number of generations per budget.
        offspring: children per generation.
        survivors: children that pass each stage of selection; the last number is 1.
        tokens: tokens for each evaluation in each stage of selection.
        initial_candidates: random candidates from which ``evolve`` takes its start if no uniform bit-width meets the
            budget.
        initial_tokens: tokens for each evaluation of these.
        proposals_per_offspring: random children that the surrogate of ``hybrid`` ranks for each one that is evaluated.
        max_tokens: end the generations of a budget once they have evaluated this number of tokens.
        seed: seed of the random numbers and of the text.
        sequences: sequences of the text. It is the calibration split; the parent is calibrated on other sequences of
            it.
        sequence_length: tokens per sequence.
        batch_size: sequences per forward pass; candidates on fewer sequences share a pass.
        layer_forward: ``dense``: dequantized weights, cached. ``planes``: nested kernels on the parent's planes.
            ``auto``: planes on a GPU with CuPy, otherwise dense.
        cache_gb: size of the cache of dequantized weights, in 10^9 bytes.
    """

    name: str = "hybrid"
    method: str = "hybrid"
    average_bits: float | None = None
    budget_gb: float | None = None
    budgets: tuple[float, ...] = ()
    bits: tuple[int, ...] = tuple(BIT_WIDTHS)
    fuse_shared_inputs: bool = False
    fitness: str = "kl"
    top_k: int = 64
    sensitivity: str = "shared"
    sensitivity_tokens: int = 1024
    generations: int = 12
    offspring: int = 12
    survivors: tuple[int, ...] = (3, 1)
    tokens: tuple[int, ...] = (1024, 4096)
    initial_candidates: int = 10
    initial_tokens: int = 4096
    proposals_per_offspring: int = 32
    max_tokens: int | None = None
    seed: int = 0
    sequences: int = 64
    sequence_length: int = 256
    batch_size: int = 8
    layer_forward: Literal["auto", "dense", "planes"] = "auto"
    cache_gb: float = 4.0

    @property
    def wanted(self) -> bool:
        """True unless ``method`` is ``none``."""
        return self.method != NO_SEARCH

    @property
    def number_of_budgets(self) -> int:
        """Number of budget settings that have a value."""
        return (self.average_bits is not None) + (self.budget_gb is not None) + bool(self.budgets)

    @property
    def ascending_budgets(self) -> list[Budget]:
        """Budgets of the search, ascending."""
        if self.budget_gb is not None:
            return [Budget(kind="bytes", value=decimal_fraction(self.budget_gb) * 10**9)]
        average_bits = [self.average_bits] if self.average_bits is not None else sorted(self.budgets)
        return [Budget(kind="average_bits", value=decimal_fraction(bits)) for bits in average_bits]


def with_default_method(search: SearchConfig) -> SearchConfig:
    """Replace the method ``none`` by ``hybrid`` if a budget is given."""
    if not search.wanted and search.number_of_budgets:
        return dataclasses.replace(search, name="hybrid", method="hybrid")
    return search


def check_search(search: SearchConfig, master_bits: int, *, per_bit_models: bool) -> None:
    """Check the settings.

    Args:
        master_bits: bits of the parent's codes.
        per_bit_models: True if the quantization method makes one model per bit-width.

    Raises:
        UserError: a setting is out of range or contradicts another.
    """
    if not search.wanted:
        return
    if per_bit_models:
        raise UserError(
            f"search={search.name} mixes bit-widths of one parent, but the method makes one model per bit-width. "
            "Use method=matgptq, or method.per_bit_models=false."
        )
    if search.number_of_budgets != 1:
        raise UserError(
            f"search={search.name} needs exactly one budget: search.average_bits (for example 3.0), search.budget_gb, or "
            f"search.budgets (a list of average bits); found {search.number_of_budgets} of them."
        )
    _check_bits(search, master_bits)
    _check_selection(search)
    _check_minimums(search)
    _check_registered_names(search)


def _check_registered_names(search: SearchConfig) -> None:
    # Imported late: the registries import the implementations, which import this module and torch.
    from matquant.search.fitness import FITNESS_FUNCTIONS
    from matquant.search.methods import SEARCH_METHODS
    from matquant.search.sensitivity import SENSITIVITY_ESTIMATORS

    registries: dict[str, Collection[str]] = {
        "method": [NO_SEARCH, *SEARCH_METHODS],
        "fitness": FITNESS_FUNCTIONS,
        "sensitivity": SENSITIVITY_ESTIMATORS,
    }
    for setting, names in registries.items():
        if getattr(search, setting) not in names:
            raise UserError(f"search.{setting} must be one of {', '.join(names)}; found {getattr(search, setting)!r}.")


def _check_bits(search: SearchConfig, master_bits: int) -> None:
    if not search.bits or len(set(search.bits)) != len(search.bits):
        raise UserError(f"search.bits needs at least one bit-width, and each one only once; found {list(search.bits)}.")
    highest = min(MAX_BITS, master_bits)
    for bits in search.bits:
        if not MIN_BITS <= bits <= highest:
            raise UserError(f"search.bits: a bit-width must lie in {MIN_BITS}..{highest}; found {bits}.")
    for budget in search.ascending_budgets:
        if budget.kind == "average_bits" and budget.value < min(search.bits):
            raise UserError(
                f"The budget of {budget} is too small: the lowest bit-width of search.bits is {min(search.bits)}. "
                "Raise the budget, or add a lower bit-width."
            )


def _check_selection(search: SearchConfig) -> None:
    if not search.survivors or len(search.survivors) != len(search.tokens) or search.survivors[-1] != 1:
        raise UserError(
            f"search.survivors={list(search.survivors)} and search.tokens={list(search.tokens)} need one value per stage of "
            "selection each, and the last number of survivors must be 1."
        )
    if any(a < b for a, b in zip(search.survivors, search.survivors[1:], strict=False)):
        raise UserError(f"search.survivors must not increase from stage to stage; found {list(search.survivors)}.")


def _check_minimums(search: SearchConfig) -> None:
    minimums = {
        "generations": 0,
        "offspring": 1,
        "top_k": 1,
        "sensitivity_tokens": 2,
        "initial_candidates": 1,
        "initial_tokens": 2,
        "proposals_per_offspring": 1,
        "sequences": 1,
        "sequence_length": 2,
        "batch_size": 1,
    }
    for name, minimum in minimums.items():
        if getattr(search, name) < minimum:
            raise UserError(f"search.{name} must be at least {minimum}; found {getattr(search, name)}.")
