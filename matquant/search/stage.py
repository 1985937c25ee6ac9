"""The search stage: from a parent and some text to allocations, kept in the store and resumable.

    parent, text ──► losses of units alone ──► knapsack ──► evolution ──► an allocation for each budget

With several budgets all of them share the units' losses and, for ``hybrid``, one surrogate; each starts from the better of
the knapsack's optimum and the allocation of the budget below with bits added, so that quality never falls as the budget grows.
"""

import dataclasses
import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from matquant.data import texts
from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.quantize.parent import Parent
from matquant.search import knapsack, sensitivity
from matquant.search.allocation import Allocation
from matquant.search.evaluator import Evaluator, open_evaluator
from matquant.search.evolution import Chance, Guided, Proposer, Selection, evolve
from matquant.search.knapsack import Losses
from matquant.search.mutation import random_start, uniform_start
from matquant.search.problem import Budget, Candidate, Layer, Problem, make_problem
from matquant.search.settings import SearchConfig
from matquant.search.slices import DecodedSlices, PlaneSlices, Slices
from matquant.search.surrogate import Surrogate
from matquant.store import Draft, Store

# Part of a search's key: raised when the same settings would find other allocations than before.
_VERSION = 2
_NO_PART_OF_KEY = ("name", "batch_size", "cache_gigabytes", "serve")
_NEVER = 1e9  # a loss that no sum of losses reaches


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a search found: an allocation for each budget, ascending, and its record for the results."""

    allocations: tuple[Allocation, ...]
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a search works on: the model and its parent, the text, and where to compute."""

    blocks: BlockModel
    parent: Parent
    windows: Tensor  # int64 [sequences, length]
    device: torch.device
    dtype: torch.dtype


def problems(config: SearchConfig, setting: Setting) -> list[Problem]:
    """A problem for each budget.

    Raises:
        UserError: a budget that even the narrowest width exceeds.
    """
    layers = _layers(setting.parent, config.widths)
    fused = _fused(setting.blocks) if config.fused else []
    return [make_problem(layers, config.widths, budget, fused) for budget in config.budgets]


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

    def build(draft: Draft) -> dict[str, Any]:
        return _Search(config, setting, asked, draft, progress).run(speed)

    artifact = store.open_or_build("search", inputs, build)
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


class _DraftJournal:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def load(self, name: str) -> Any | None:
        return self.draft.read_json(f"{name}.json") if self.draft.has(f"{name}.json") else None

    def save(self, name: str, value: Any) -> None:
        self.draft.write_json(f"{name}.json", value)


class _Search:
    """One search that is under way."""

    def __init__(
        self,
        config: SearchConfig,
        setting: Setting,
        asked: list[Problem],
        draft: Draft,
        progress: Callable[[int], None],
    ) -> None:
        self.config = config
        self.setting = setting
        self.asked = asked
        self.journal = _DraftJournal(draft)
        self.progress = progress
        self.losses: Losses = []
        self.surrogate: Surrogate | None = None
        self.spent = {"evaluations": 0, "tokens": 0, "skipped": 0}
        self.history: list[dict[str, Any]] = []

    def run(self, speed: dict[str, Any]) -> dict[str, Any]:
        """Search for every budget; ``speed`` is filled, as it is no part of what was found."""
        config = self.config
        slices = _slices(config, self.setting)
        start = time.perf_counter()
        with open_evaluator(
            self.setting.blocks, self.asked[0].units, slices, self.setting.windows, batch_size=config.batch_size,
            fitness=config.fitness, top_k=config.top_k, device=self.setting.device,
        ) as evaluator:  # fmt: skip
            if config.method != "evolve":
                self._measure_alone(evaluator)
            self.progress(1)
            front = self._front(evaluator)
        speed["served"] = "planes" if isinstance(slices, PlaneSlices) else "decoded"
        speed["seconds"] = round(time.perf_counter() - start, 3)
        speed["evaluations_per_second"] = round(evaluator.counts.evaluations / speed["seconds"], 3)
        speed["tokens_per_second"] = round(evaluator.counts.tokens / speed["seconds"], 1)
        units = [
            {"layers": list(unit.layers), "loss": {str(bits): loss for bits, loss in losses.items()}}
            for unit, losses in zip(self.asked[0].units, self.losses, strict=False)
        ]
        facts = {"fitness": config.fitness, "widths": sorted(config.widths), "units": units, "history": self.history}
        self.journal.save("front", facts | self.spent | {"front": front})
        budgets = [str(config.budgets[0]), *([str(config.budgets[-1])] if len(front) > 1 else [])]
        return {"label": f"{config.method} {' to '.join(budgets)}"}

    def _measure_alone(self, evaluator: Evaluator) -> None:
        """The units' losses alone; they are the surrogate's first belief."""
        problem, config = self.asked[0], self.config
        if config.sensitivity == "error":
            errors = {row["name"]: row["error"] for row in self.setting.parent.layer_errors()}
            try:
                self.losses = sensitivity.from_errors(problem, errors)
            except ValueError as error:
                raise UserError(f"search.sensitivity=error: {error}. Use search.sensitivity=measured.") from None
            return
        saved = self.journal.load("sensitivity")
        if saved is None:
            sample = evaluator.draw(config.sensitivity_tokens, random.Random(f"{config.seed} sensitivity"))
            before = dataclasses.replace(evaluator.counts)
            if config.sensitivity == "shared":
                anchors = sorted(set[int]().union(*(sensitivity.anchors_of(p) for p in self.asked)))
                losses = sensitivity.measure_shares(problem, evaluator, sample, anchors)
            else:
                losses = sensitivity.measure(problem, evaluator, sample)
            saved = {
                "losses": [[unit[bits] for bits in problem.widths] for unit in losses],
                "evaluations": evaluator.counts.evaluations - before.evaluations,
                "tokens": evaluator.counts.tokens - before.tokens,
            }
            self.journal.save("sensitivity", saved)
        self.losses = [dict(zip(problem.widths, unit, strict=True)) for unit in saved["losses"]]
        for key in ("evaluations", "tokens"):
            self.spent[key] += saved[key]

    def _front(self, evaluator: Evaluator) -> list[dict[str, Any]]:
        if self.config.method == "hybrid":
            self.surrogate = Surrogate(self.asked[0], self.losses)
        front: list[dict[str, Any]] = []
        for problem, budget in zip(self.asked, self.config.budgets, strict=True):
            below = front[-1] if front else None
            name = f"budget-{len(front):02d}"
            row = self.journal.load(name)
            candidate, history = self._one_budget(problem, budget, below, evaluator, name)
            if row is None:
                row = self._measured(problem, candidate, below, evaluator)
                self.journal.save(name, row)
            self.history += [{"budget": str(budget)} | entry for entry in history]
            for key in self.spent:
                self.spent[key] += sum(entry[key] for entry in history)
            for key in ("evaluations", "tokens"):
                self.spent[key] += row["final"][key]
            front.append(row)
            self.progress(1)
        return front

    def _one_budget(
        self, problem: Problem, budget: Budget, below: dict[str, Any] | None, evaluator: Evaluator, name: str
    ) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """The finalists of one budget, and the history of its evolution."""
        config = self.config
        start = self._start(problem, budget, below, evaluator, name)
        if config.method == "sensitivity":
            return [start], []
        proposer: Proposer = Guided(self.surrogate, config.proposals) if self.surrogate is not None else Chance()
        found, history = evolve(
            problem, evaluator, start, proposer,
            Selection(offspring=config.offspring, survivors=config.survivors, tokens=config.tokens),
            generations=config.generations, max_tokens=config.max_tokens, seed=str(config.seed), journal=self.journal,
            name=name,
        )  # fmt: skip
        # What a few tokens preferred is held against where it came from on all of them; EvoPress takes it as it is.
        return list(dict.fromkeys([found] if config.method == "evolve" else [found, start])), history

    def _start(
        self, problem: Problem, budget: Budget, below: dict[str, Any] | None, evaluator: Evaluator, name: str
    ) -> Candidate:
        if self.config.method == "evolve":
            return self._evolve_start(problem, budget, evaluator, name)
        losses = self.losses if self.surrogate is None else self.surrogate.losses()
        optimum = knapsack.solve(problem, losses)
        if below is None or self.config.method == "sensitivity":
            return optimum
        floor = below["candidate"]
        more = [
            {bits: loss if bits >= least else _NEVER for bits, loss in unit.items()}
            for unit, least in zip(losses, floor, strict=True)
        ]
        return self._best(f"{name}-start", [optimum, knapsack.solve(problem, more)], self.config.tokens[-1], evaluator)

    def _evolve_start(self, problem: Problem, budget: Budget, evaluator: Evaluator, name: str) -> Candidate:
        uniform = uniform_start(problem, budget.value) if budget.kind == "average_bits" else None
        if uniform is not None:
            return uniform
        rng = random.Random(f"{self.config.seed} {name} start")
        candidates = [random_start(problem, rng) for _ in range(self.config.initial)]
        return self._best(f"{name}-start", candidates, self.config.initial_tokens, evaluator)

    def _best(self, name: str, candidates: list[Candidate], tokens: int, evaluator: Evaluator) -> Candidate:
        saved = self.journal.load(name)
        if saved is None:
            candidates = list(dict.fromkeys(candidates))
            sample = evaluator.draw(tokens, random.Random(f"{self.config.seed} {name}"))
            losses = evaluator.losses(candidates, sample)
            best = min(range(len(candidates)), key=losses.__getitem__)
            saved = {
                "best": candidates[best], "evaluations": len(candidates),
                "tokens": len(candidates) * evaluator.size(sample),
            }  # fmt: skip
            self.journal.save(name, saved)
        for key in ("evaluations", "tokens"):
            self.spent[key] += saved[key]
        return tuple(saved["best"])

    def _measured(
        self, problem: Problem, finalists: list[Candidate], below: dict[str, Any] | None, evaluator: Evaluator
    ) -> dict[str, Any]:
        """The best of the finalists on all of the text; the allocation of the budget below if that is better still."""
        everything = evaluator.everything()
        losses = evaluator.losses(finalists, everything)
        best = min(range(len(finalists)), key=losses.__getitem__)
        candidate, loss = finalists[best], losses[best]
        if below is not None and below["measured"] < loss:
            candidate, loss = tuple(below["candidate"]), below["measured"]
        return {
            "candidate": list(candidate),
            "average_bits": problem.average_bits(candidate),
            "measured": loss,
            "predicted": sum(u[b] for u, b in zip(self.losses, candidate, strict=True)) if self.losses else None,
            "final": {"evaluations": len(finalists), "tokens": len(finalists) * evaluator.size(everything)},
        }


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
        widths=widths,
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


def _slices(config: SearchConfig, setting: Setting) -> Slices:
    """What serves the candidates. The kernels need half precision, and CuPy to be compiled with."""
    parent, device, dtype = setting.parent, setting.device, setting.dtype
    codes = {n: w for i in range(len(parent.blocks)) for n, w in parent.block(i).items()}
    able = device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("cupy") is not None
    if config.serve == "planes" or (config.serve == "auto" and able):
        return PlaneSlices(codes, device, dtype)
    return DecodedSlices(codes, device, dtype, int(config.cache_gigabytes * 1e9))


def _layers(parent: Parent, widths: tuple[int, ...]) -> list[Layer]:
    return [
        Layer(
            name=name,
            block=index,
            parameters=weight.codes.numel(),
            bytes={bits: weight.bytes_read(bits) for bits in widths},
        )
        for index in range(len(parent.blocks))
        for name, weight in parent.block(index).items()
    ]


def _fused(blocks: BlockModel) -> list[list[str]]:
    """Layers that read the very same input: a runtime that fuses q, k and v, or gate and up, needs one width for them."""
    return [group for index in range(len(blocks)) for group in blocks.input_groups(index).groups]
