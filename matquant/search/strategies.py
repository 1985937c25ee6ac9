"""One search that is under way: what it measures, where it starts, and which allocation it settles on for each budget."""

import dataclasses
import importlib.util
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel
from matquant.search import knapsack, sensitivity
from matquant.search.allocation_problem import Budget, Candidate, Problem
from matquant.search.config import SearchConfig
from matquant.search.evaluator import Evaluator, open_evaluator
from matquant.search.evolution import Chance, Guided, Proposer, Selection, evolve
from matquant.search.knapsack import Losses
from matquant.search.layer_forwards import DecodedSlices, PlaneSlices, Slices
from matquant.search.mutation import random_start, uniform_start
from matquant.search.surrogate import Surrogate
from matquant.store.distributed_store import DraftLike

_NEVER = 1e9  # a loss that no sum of losses reaches


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a search works on: the model and its parent, the text, and where to compute."""

    blocks: BlockModel
    parent: Parent
    windows: Tensor  # int64 [sequences, length]
    device: torch.device
    dtype: torch.dtype
    process_group: ProcessGroup = SINGLE_PROCESS  # the processes that share the candidates


class _DraftJournal:
    def __init__(self, draft: DraftLike) -> None:
        self.draft = draft

    def load(self, name: str) -> Any | None:
        return self.draft.read_json(f"{name}.json") if self.draft.has(f"{name}.json") else None

    def save(self, name: str, value: Any) -> None:
        self.draft.write_json(f"{name}.json", value)


class Search:
    """One search that is under way."""

    def __init__(
        self,
        config: SearchConfig,
        setting: Setting,
        asked: list[Problem],
        draft: DraftLike,
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
            self.setting.blocks,
            self.asked[0].units,
            slices,
            self.setting.windows,
            batch_size=config.batch_size,
            fitness=config.fitness,
            top_k=config.top_k,
            device=self.setting.device,
            process_group=self.setting.process_group,
        ) as evaluator:
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
            problem,
            evaluator,
            start,
            proposer,
            Selection(offspring=config.offspring, survivors=config.survivors, tokens=config.tokens),
            generations=config.generations,
            max_tokens=config.max_tokens,
            seed=str(config.seed),
            journal=self.journal,
            name=name,
        )
        if config.method == "evolve":  # EvoPress takes it as it is
            return [found], history
        # What a few tokens preferred is held on all of them against where it came from, and against what follows from
        # everything that was measured.
        learned = [knapsack.solve(problem, self.surrogate.losses())] if self.surrogate is not None else []
        return list(dict.fromkeys([found, start, *learned])), history

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
                "best": candidates[best],
                "evaluations": len(candidates),
                "tokens": len(candidates) * evaluator.size(sample),
            }
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


def _slices(config: SearchConfig, setting: Setting) -> Slices:
    """What serves the candidates. The kernels need half precision, and CuPy to be compiled with."""
    parent, device, dtype = setting.parent, setting.device, setting.dtype
    codes = {n: w for i in range(len(parent.blocks)) for n, w in parent.block(i).items()}
    able = device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("cupy") is not None
    if config.serve == "planes" or (config.serve == "auto" and able):
        return PlaneSlices(codes, device, dtype)
    return DecodedSlices(codes, device, dtype, int(config.cache_gigabytes * 1e9))
