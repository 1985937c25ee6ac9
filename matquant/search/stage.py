"""The search stage: from a parent and some text to allocations, kept in the store and resumable.

    parent, text ──► losses of units alone ──► knapsack ──► evolution ──► an allocation for each budget

With several budgets all of them share the units' losses and, for ``hybrid``, one surrogate; each starts from the better of
the knapsack's optimum and the allocation of the budget below with bits added, so that quality never falls as the budget grows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matquant.data import texts
from matquant.formats.allocation import Allocation
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel
from matquant.models.tracing import shared_input_groups
from matquant.search.allocation_problem import Budget, Layer, Problem, make_problem
from matquant.search.config import SearchConfig
from matquant.search.strategies import Search, Setting
from matquant.store import Store
from matquant.store.distributed_store import DraftLike, open_or_build

# Part of a search's key: raised when the same settings would find other allocations than before.
_VERSION = 2
_NO_PART_OF_KEY = ("name", "batch_size", "cache_gigabytes", "serve")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a search found: an allocation for each budget, ascending, and its record for the results."""

    allocations: tuple[Allocation, ...]
    record: dict[str, Any]


def problems(config: SearchConfig, setting: Setting) -> list[Problem]:
    """A problem for each budget.

    Raises:
        UserError: a budget that even the narrowest width exceeds.
    """
    layers = _layers(_blocks(setting.parent), config.widths)
    fused = _fused(setting.blocks) if config.fused else []
    return [make_problem(layers, config.widths, budget, fused) for budget in config.budgets]


def check_budgets(config: SearchConfig, blocks: Sequence[Mapping[str, NestedWeight]]) -> None:
    """Refuse a budget that cannot be kept, before anything is quantized.

    Args:
        blocks: the layers of each block as the parent will have them; only their shapes are looked at.

    Raises:
        UserError: a budget that even the narrowest width exceeds.
    """
    layers = _layers(blocks, config.widths)
    for budget in config.budgets:
        make_problem(layers, config.widths, budget)


def search(config: SearchConfig, setting: Setting, store: Store, progress: Callable[[int], None]) -> Outcome:
    """Find an allocation for each budget, or take them from the store.

    Args:
        progress: called with 1 for the units' losses, and for each budget; ``len(config.budgets) + 1`` in all.

    Raises:
        UserError: a budget cannot be kept, or layers lack the errors that ``search.sensitivity=error`` needs.
    """
    asked = problems(config, setting)
    inputs = {
        "parent": setting.parent.artifact.sha256,
        "search": {k: v for k, v in dataclasses.asdict(config).items() if k not in _NO_PART_OF_KEY},
        "text": texts.fingerprint(setting.windows),
        "computed": [setting.device.type, str(setting.dtype)],
        "version": _VERSION,
    }
    speed: dict[str, Any] = {}

    def build(draft: DraftLike) -> dict[str, Any]:
        return Search(config, setting, asked, draft, progress).run(speed)

    artifact = open_or_build(store, setting.process_group, "search", inputs, build)
    found = artifact.read_json("front.json")
    record = {"name": config.name, "method": config.method, "path": str(artifact.path), "reused": artifact.reused}
    record |= {key: found[key] for key in ("fitness", "widths", "evaluations", "tokens", "skipped", "history", "units")}
    files = _file_names(config.budgets)
    record["front"] = [
        {"file": file, "budget": str(budget)} | {k: row[k] for k in ("average_bits", "measured", "predicted")}
        for file, budget, row in zip(files, config.budgets, found["front"], strict=True)
    ]
    allocations = tuple(
        _allocation(config, problem, budget, setting.parent, row)
        for problem, budget, row in zip(asked, config.budgets, found["front"], strict=True)
    )
    return Outcome(allocations=allocations, record=record | speed)


def _file_names(budgets: Sequence[Budget]) -> list[str]:
    """Where a run puts its allocations: ``allocation.yaml``, or ``allocations/3.25-bits.yaml`` and so on."""
    if len(budgets) == 1:
        return ["allocation.yaml"]
    return [f"allocations/{str(budget).replace(' ', '-')}.yaml" for budget in budgets]


def _allocation(
    config: SearchConfig, problem: Problem, budget: Budget, parent: Parent, row: dict[str, Any]
) -> Allocation:
    candidate = tuple(row["candidate"])
    by_unit = problem.layer_widths(candidate)
    widths = {name: by_unit[name] for index in range(len(parent.blocks)) for name in parent.block(index)}
    limit = {"average_bits": float(budget.value)} if budget.kind == "average_bits" else {"bytes": problem.limit}
    return Allocation(
        bits=widths,
        average_bits=row["average_bits"],
        bytes=sum(parent.block(i)[n].bytes_read(widths[n]) for i in range(len(parent.blocks)) for n in parent.block(i)),
        about={
            "method": config.method,
            "budget": limit,
            "fused": config.fused,
            "seed": config.seed,
            "fitness": config.fitness,
            "measured": row["measured"],
            "predicted": row["predicted"],
            "predicted_from": None if row["predicted"] is None else config.sensitivity,
            "parent": parent.artifact.sha256,
        },
    )


def _blocks(parent: Parent) -> list[Mapping[str, NestedWeight]]:
    return [parent.block(index) for index in range(len(parent.blocks))]


def _layers(blocks: Sequence[Mapping[str, NestedWeight]], widths: tuple[int, ...]) -> list[Layer]:
    return [
        Layer(
            name=name,
            block=index,
            parameters=weight.codes.numel(),
            bytes={bits: weight.bytes_read(bits) for bits in widths},
        )
        for index, block in enumerate(blocks)
        for name, weight in block.items()
    ]


def _fused(blocks: BlockModel) -> list[list[str]]:
    """Layers that read the very same input: a runtime that fuses q, k and v, or gate and up, needs one width for them."""
    return [group for index in range(len(blocks)) for group in shared_input_groups(blocks, index).groups]
