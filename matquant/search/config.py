"""The config group ``search``, and what it refuses."""

import dataclasses
from typing import Literal

from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS
from matquant.search.allocation_problem import Budget, exact


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How a width is found for each layer, and within which budget."""

    name: str  # of the preset
    method: Literal["none", "sensitivity", "evolve", "hybrid"]
    average_bits: float | None  # the budget, by parameters of the quantized layers
    gigabytes: float | None  # or in 10^9 bytes that a runtime reads of them per token, scales included
    ladder: tuple[float, ...]  # or several budgets in average bits
    widths: tuple[int, ...]
    fused: bool  # layers that share their input (q, k, v; gate, up) share a width, for runtimes that fuse them
    fitness: Literal["kl", "sparse_kl", "perplexity"]
    top_k: int  # tokens that sparse_kl looks at
    # Each layer's loss alone, measured at every width; its share of the uniform slices' losses, measured at the widths next
    # to the budget; or its relative second-order error.
    sensitivity: Literal["measured", "shared", "error"]
    sensitivity_tokens: int
    generations: int
    offspring: int
    survivors: tuple[int, ...]  # of each stage of selection, the last of them 1
    tokens: tuple[int, ...]  # that each stage measures candidates on
    initial: int  # random candidates of the first generation, where no uniform width meets the budget
    initial_tokens: int
    proposals: int  # of hybrid, for each offspring: the surrogate measures the most promising only
    max_tokens: int | None  # the search ends with the generation in which it has measured as many
    seed: int
    sequences: int  # of the text: the calibration text, other windows of it
    sequence_length: int
    batch_size: int  # windows that go through the model at a time, those of several candidates together
    serve: Literal["auto", "decoded", "planes"]  # candidates by dense weights, or by kernels that read bit planes
    cache_gigabytes: float  # for decoded slices

    @property
    def wanted(self) -> bool:
        return self.method != "none"

    @property
    def budgets(self) -> list[Budget]:
        """What is searched for, in ascending order."""
        if self.gigabytes is not None:
            return [Budget(kind="bytes", value=exact(self.gigabytes) * 10**9)]
        average = [self.average_bits] if self.average_bits is not None else sorted(self.ladder)
        return [Budget(kind="average_bits", value=exact(bits)) for bits in average]


def chosen(search: SearchConfig) -> SearchConfig:
    """``search=none`` with a budget means the default method."""
    if search.method == "none" and (search.average_bits is not None or search.gigabytes is not None or search.ladder):
        return dataclasses.replace(search, name="hybrid", method="hybrid")
    return search


def check(search: SearchConfig, master_bits: int, *, dedicated: bool) -> None:
    """Refuse settings that no search can follow.

    Raises:
        UserError: in a sentence.
    """
    if not search.wanted:
        return
    if dedicated:
        raise UserError(
            f"search={search.name} mixes widths of one parent, but the method makes a model for each width. "
            "Use method=matgptq, or method.per_bit_models=false."
        )
    given = [search.average_bits is not None, search.gigabytes is not None, bool(search.ladder)]
    if sum(given) != 1:
        raise UserError(
            f"search={search.name} needs one budget: search.average_bits (such as 3.0), search.gigabytes, or search.ladder "
            f"(a list of average bits); found {sum(given)} of them."
        )
    _check_widths(search, master_bits)
    _check_evolution(search)


def _check_widths(search: SearchConfig, master_bits: int) -> None:
    if not search.widths or len(set(search.widths)) != len(search.widths):
        raise UserError(f"search.widths needs different widths; found {list(search.widths)}.")
    for bits in search.widths:
        if not MIN_BITS <= bits <= min(MAX_BITS, master_bits):
            raise UserError(
                f"search.widths: a width must lie in {MIN_BITS}..{min(MAX_BITS, master_bits)}; found {bits}."
            )
    for budget in search.budgets:
        if budget.kind == "average_bits" and budget.value < min(search.widths):
            raise UserError(
                f"A budget of {budget} cannot be kept: the narrowest of search.widths is {min(search.widths)} bits."
            )


def _check_evolution(search: SearchConfig) -> None:
    if not search.survivors or len(search.survivors) != len(search.tokens) or search.survivors[-1] != 1:
        raise UserError(
            f"search.survivors={list(search.survivors)} and search.tokens={list(search.tokens)} describe the same stages of "
            "selection: as many of one as of the other, and the last survivor alone."
        )
    if any(a < b for a, b in zip(search.survivors, search.survivors[1:], strict=False)):
        raise UserError(f"search.survivors cannot grow from stage to stage; found {list(search.survivors)}.")
    least = {"generations": 0, "offspring": 1, "top_k": 1, "sensitivity_tokens": 2, "initial": 1, "initial_tokens": 2}
    least |= {"proposals": 1, "sequences": 1, "sequence_length": 2, "batch_size": 1}
    for name, low in least.items():
        if getattr(search, name) < low:
            raise UserError(f"search.{name} must be at least {low}; found {getattr(search, name)}.")
    if min(search.tokens) < 2 or min(search.survivors) < 1:
        raise UserError("search.tokens needs at least 2 tokens in each stage, and search.survivors at least 1.")
    if search.cache_gigabytes < 0:
        raise UserError(f"search.cache_gigabytes cannot be negative; found {search.cache_gigabytes}.")
