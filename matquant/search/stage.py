"""Search stage: from a parent and a text to one allocation per budget, in the store and resumable.

    parent, text ──► losses of single units ──► knapsack ──► evolution ──► one allocation per budget

Budgets are searched in ascending order. If the result of a budget is worse than that of the next lower budget, the
latter replaces it, so that the loss never increases with the budget.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matquant.data import texts
from matquant.formats.allocation import Allocation
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import Parent
from matquant.models.tracing import shared_input_groups
from matquant.search.allocation_problem import AllocationProblem, Budget, LayerCost, make_problem
from matquant.search.budget_loop import search_budgets
from matquant.search.config import SearchConfig
from matquant.search.context import SearchContext
from matquant.search.evaluator import EvaluatorConfig, open_evaluator
from matquant.search.fitness import FITNESS_FUNCTIONS
from matquant.search.journal import DraftJournal
from matquant.search.layer_forwards import make_layer_forwards
from matquant.search.search_run import SearchRun
from matquant.store import Store
from matquant.store.distributed_store import DraftLike, open_or_build

# Part of the key of a search. Raise it when the same settings give other allocations, or the artifact has another
# content.
_VERSION = 3
_NOT_IN_KEY = ("name", "batch_size", "cache_gb", "layer_forward")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """One allocation per budget, ascending, and the record for the results."""

    allocations: tuple[Allocation, ...]
    record: dict[str, Any]


def search(config: SearchConfig, context: SearchContext, store: Store, progress: Callable[[int], None]) -> SearchResult:
    """Find one allocation per budget, or take them from the store.

    Args:
        progress: called with 1 after the preparation and after each budget; ``len(config.ascending_budgets) + 1``
            calls.

    Raises:
        UserError: the lowest bit-width exceeds a budget, or the parent lacks data that ``search.sensitivity`` needs.
    """
    problems = make_problems(config, context)
    inputs = {
        "parent": context.parent.artifact.sha256,
        "search": {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_IN_KEY},
        "text": texts.fingerprint(context.sequences),
        "computed": [context.device.type, str(context.dtype)],
        "version": _VERSION,
    }
    speed: dict[str, Any] = {}  # filled by the build only: it is no part of the artifact

    def build(draft: DraftLike) -> dict[str, Any]:
        speed.update(_run(config, context, problems, draft, progress))
        budgets = [str(budget) for budget in config.ascending_budgets]
        return {"label": f"{config.method} {' to '.join(dict.fromkeys([budgets[0], budgets[-1]]))}"}

    artifact = open_or_build(store, context.process_group, "search", inputs, build)
    found = artifact.read_json("front.json")
    record = {"name": config.name, "method": config.method, "path": str(artifact.path), "reused": artifact.reused}
    record |= {key: found[key] for key in ("fitness", "bits", "evaluations", "tokens", "skipped", "history", "units")}
    record["front"] = _front_record(config.ascending_budgets, found["front"])
    allocations = tuple(
        _allocation(config, problem, budget, context.parent, row)
        for problem, budget, row in zip(problems, config.ascending_budgets, found["front"], strict=True)
    )
    return SearchResult(allocations=allocations, record=record | speed)


def make_problems(config: SearchConfig, context: SearchContext) -> list[AllocationProblem]:
    """Build the problem of each budget.

    Raises:
        UserError: the lowest bit-width exceeds a budget.
    """
    blocks, parent = context.blocks, context.parent
    layers = _layer_costs([parent.block(index) for index in range(len(parent.blocks))], config.bits)
    fused: list[list[str]] = []
    if config.fuse_shared_inputs:
        fused = [group for index in range(len(blocks)) for group in shared_input_groups(blocks, index).groups]
    return [make_problem(layers, config.bits, budget, fused) for budget in config.ascending_budgets]


def check_budgets(config: SearchConfig, blocks: Sequence[Mapping[str, NestedWeight]]) -> None:
    """Check the budgets before the parent exists.

    Args:
        blocks: layers of each block by name, in the format of the future parent; only shapes and formats are used.

    Raises:
        UserError: the lowest bit-width exceeds a budget.
    """
    layers = _layer_costs(blocks, config.bits)
    for budget in config.ascending_budgets:
        make_problem(layers, config.bits, budget)


def _run(
    config: SearchConfig,
    context: SearchContext,
    problems: Sequence[AllocationProblem],
    draft: DraftLike,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Search and write ``front.json``; return the speed of the search."""
    parent = context.parent
    weights = {name: weight for index in range(len(parent.blocks)) for name, weight in parent.block(index).items()}
    layer_forwards = make_layer_forwards(
        config.layer_forward, weights, context.device, context.dtype, int(config.cache_gb * 1e9)
    )
    settings = EvaluatorConfig(
        fitness=FITNESS_FUNCTIONS[config.fitness].from_config(config),
        batch_size=config.batch_size,
        device=context.device,
        process_group=context.process_group,
    )
    start = time.perf_counter()
    with open_evaluator(context.blocks, problems[0].units, layer_forwards, context.sequences, settings) as evaluator:
        run = SearchRun(config, context, problems, evaluator, DraftJournal(draft))
        found = search_budgets(run, progress)
    seconds = round(time.perf_counter() - start, 3)
    run.journal.save("front", found)
    return {
        "served": layer_forwards.name,
        "seconds": seconds,
        "evaluations_per_second": round(evaluator.cost.evaluations / seconds, 3),
        "tokens_per_second": round(evaluator.cost.tokens / seconds, 1),
    }


def _front_record(budgets: Sequence[Budget], front: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """File name, budget, average bits and losses of each allocation."""
    files = ["allocation.yaml"]
    if len(budgets) > 1:
        files = [f"allocations/{str(budget).replace(' ', '-')}.yaml" for budget in budgets]
    return [
        {"file": file, "budget": str(budget)} | {key: row[key] for key in ("average_bits", "measured", "predicted")}
        for file, budget, row in zip(files, budgets, front, strict=True)
    ]


def _allocation(
    config: SearchConfig, problem: AllocationProblem, budget: Budget, parent: Parent, row: Mapping[str, Any]
) -> Allocation:
    by_unit = problem.layer_bits(tuple(row["candidate"]))
    weights = {name: weight for index in range(len(parent.blocks)) for name, weight in parent.block(index).items()}
    bits = {name: by_unit[name] for name in weights}
    limit = {"average_bits": float(budget.value)} if budget.kind == "average_bits" else {"bytes": problem.limit}
    return Allocation(
        bits=bits,
        average_bits=row["average_bits"],
        bytes=sum(weight.bytes_read(bits[name]) for name, weight in weights.items()),
        about={
            "method": config.method,
            "budget": limit,
            "fused": config.fuse_shared_inputs,
            "seed": config.seed,
            "fitness": config.fitness,
            "measured": row["measured"],
            "predicted": row["predicted"],
            "predicted_from": None if row["predicted"] is None else config.sensitivity,
            "parent": parent.artifact.sha256,
        },
    )


def _layer_costs(blocks: Sequence[Mapping[str, NestedWeight]], bits: Sequence[int]) -> list[LayerCost]:
    return [
        LayerCost(
            name=name, block=index, parameters=weight.codes.numel(), bytes_read={b: weight.bytes_read(b) for b in bits}
        )
        for index, block in enumerate(blocks)
        for name, weight in block.items()
    ]
