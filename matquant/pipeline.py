"""The stages of one job, from a typed config to what stands in its folder.

    model, calibration text ──► quantize ──► parent (in the store) ──► evaluate ──► results.json, report.html, wandb

The objective decides the parent; ``bits`` only decides which slices are measured, so jobs that differ in ``bits`` alone
share one parent. A dedicated method makes one model per width instead.
"""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from matquant import distributed, generating, machine, outcome, report
from matquant.config import Config
from matquant.data import texts
from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices, steps
from matquant.evaluate.tasks import Scores, Tasks, evaluate_tasks
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.formats.parent import Parent
from matquant.formats.slice_spec import SliceSpec
from matquant.models.summary import unquantized_parameters
from matquant.opening import Opened
from matquant.options import as_json, own_options, solver_options
from matquant.pack.stage import Packing
from matquant.plan import Plan
from matquant.planning import plan_quantizing, plan_the_rest
from matquant.progress import ProgressBars
from matquant.quantize.driver import CalibrationOptions, Driver
from matquant.quantize.gptq.solver import SolverOptions
from matquant.report.output_files import write_atomic
from matquant.search.stage import search as run_search
from matquant.search.strategies import Setting
from matquant.store import Store
from matquant.store.distributed_store import DraftLike, open_or_build

log = logging.getLogger(__name__)

# Part of a parent's key: raised when the same settings would give other codes than before.
_SOLVER_VERSION = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where a job writes, and what it is called."""

    folder: Path
    command: str
    name: str
    group: str | None
    resolved: Any


def run_job(config: Config, job: Job) -> float | None:
    """Run all stages of one job.

    Returns:
        The mean over the measured slices of ``config.metric``, or None without evaluation; of several processes the first
        one alone has it, and writes.

    Raises:
        UserError: something in the config, model or text cannot be worked with.
    """
    results = compute(config, job)
    if distributed.rank_from_env() > 0:
        return None
    report.write(results, job.folder)
    _write_allocations(results, job.folder)
    page = report.write_report(results, job.folder)
    if config.tracking.wandb:
        failure = report.track(results, config.tracking, job.folder, job.group, job.name)
        if failure is not None:  # the results stand already; now they also say what is missing
            results["warnings"].append(failure)
            report.write(results, job.folder)
            report.write_report(results, job.folder)
    console = Console()
    report.print_table(results, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    generating.show(results, console)
    if "pack" in results:
        console.print(f"packed: {results['pack']['folder']}", soft_wrap=True, highlight=False)
    return outcome.figure(results, config.metric)


def _write_allocations(results: Mapping[str, Any], folder: Path) -> None:
    """What a search found, as files that ``bits`` accepts."""
    entries = {entry.get("name"): entry for entry in results["slices"]}
    for row in results["search"]["front"] if results["search"] else []:
        entry = entries[row["file"]]
        about = dict(entry["allocation"])
        found = Allocation(
            widths=about.pop("widths"), average_bits=entry["average_bits"], bytes=entry["bytes"], about=about
        )
        write_atomic(folder / row["file"], allocation.to_yaml(found))
        write_atomic((folder / row["file"]).with_suffix(".txt"), allocation.to_text(found))


def compute(config: Config, job: Job) -> dict[str, Any]:
    """The results of all stages, as they stand in results.json; writes nothing but to the store.

    Of several processes the first one alone gets results.

    Raises:
        UserError: something in the config, model or text cannot be worked with.
    """
    machine.use_threads(config.runtime.threads)
    machine.give_back_memory()
    device = machine.device(config.runtime.device)
    with distributed.init_distributed(device) as together:
        return _Run(config, job, device, together).results()


class _Run:
    """The stages of one job, and what they hand on."""

    def __init__(self, config: Config, job: Job, device: torch.device, process_group: ProcessGroup) -> None:
        self.config = config
        self.job = job
        self.device = device
        self.process_group = process_group
        self.bars = ProgressBars(config.runtime.progress if process_group.is_main else False)
        self.seconds: dict[str, float] = {}
        self.phases: Counter[str] = Counter()  # seconds of quantizing by what was done
        self.store = Store(Path(config.store.path))
        self.plan: Plan | None = None
        self.parent: Parent | None = None  # of all widths, unless the method makes a model for each
        self.search_record: dict[str, Any] | None = None
        with self._timed("load"):
            self.opened = Opened(config, device, process_group, self.store)
            self.warnings = list(self.opened.loaded.warnings)
            asked = config.eval
            wanted = asked.tasks and "evaluate" in config.stages
            self.tasks = Tasks(asked.tasks, asked.task_folder, asked.fewshot) if wanted else None
            wanted = config.pack.wanted
            self.packing = Packing(config.pack, self.opened.names, config.method, job.folder) if wanted else None

    def results(self) -> dict[str, Any]:
        with self._timed("quantize"):
            variants = self._quantize()
            if self.plan is None:
                self._announce(plan_the_rest(self.opened))
        with self._timed("search"):
            variants += self._search()
        measured: dict[str, dict[str, Any]] = {}
        with self._timed("evaluate"):
            if "evaluate" in self.config.stages:
                measured = self._evaluate(variants)
        if not self.process_group.is_main:
            return {}
        with self._timed("tasks"):
            scores = self._evaluate_tasks(variants)
        results = self._assemble(variants, measured, scores)
        if self.packing is not None:
            with self._timed("pack"), self.bars.bar("pack", len(self.opened.names)) as progress:
                results["pack"] = self.packing.run(self.opened.loaded, self.opened.blocks, variants, results, progress)
        if "generate" in self.config.stages:
            with self._timed("generate"):
                results["generate"] = generating.generate(
                    self.opened.loaded,
                    self.opened.blocks,
                    variants,
                    str(self.config.prompt),
                    self.config.max_new_tokens,
                    self.device,
                )
            results["resources"] |= self._peaks()
        return results

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def _announce(self, plan: Plan | None) -> None:
        """Say what the job needs, and refuse what cannot fit."""
        self.plan = plan
        if plan is not None:
            log.info(plan.sentence())
            if self.config.runtime.check_memory:
                plan.refuse()

    def _quantize(self) -> list[SliceSpec]:
        """Each width and allocation to measure, with its parent: one and the same, or for a dedicated method one each."""
        method, widths = self.config.method, self.config.widths
        windows = None
        if method.solver != "rtn":
            windows = self.opened.windows(self.config.calibration, "calibration")
        if method.dedicated:
            return [
                SliceSpec(name=str(b), parent=self._open_parent(options, windows), bits=b)
                for b in widths
                for options in [solver_options(method, {b: 1.0}, b, self.opened.loaded.dtype)]
            ]
        options = solver_options(method, self.config.objective.lambdas, method.master_bits, self.opened.loaded.dtype)
        parent = self.parent = self._open_parent(options, windows)
        variants = [SliceSpec(name=str(b), parent=parent, bits=b) for b in widths]
        for path, found in self.opened.allocations.items():
            variants.append(SliceSpec(name=path, parent=parent, bits=found.widths, allocation=found))
            self.warnings += outcome.changes(variants[-1])
        return variants

    def _open_parent(self, options: SolverOptions, windows: Tensor | None) -> Parent:
        """The parent that these options make, from the store or made now."""
        method = self.config.method
        calibration = CalibrationOptions(
            streams=(() if method.dedicated else method.streams) or (options.master_bits,),
            asymmetric=method.asymmetric,
            staged=method.staged,
            batch_size=self.config.calibration.batch_size,
        )
        own = own_options(method, self.opened.names, options)
        inputs = {
            "model": self.opened.loaded.fingerprint,
            "dtype": str(self.opened.loaded.dtype),
            "calibration": None if windows is None else texts.fingerprint(windows),
            "options": as_json(options),
            "streams": None if windows is None else [list(calibration.streams), method.asymmetric, method.staged],
            "layers": self.opened.names,
            "solver": _SOLVER_VERSION,
        }
        if own:
            inputs["overrides"] = {name: as_json(chosen) for name, chosen in own.items()}

        def build(draft: DraftLike) -> dict[str, Any]:
            return self._make_parent(draft, calibration, options, own, windows)

        artifact = open_or_build(self.store, self.process_group, "parent", inputs, build)
        parent = Parent(artifact)
        self.warnings += [*artifact.notes, *parent.notes()]
        return parent

    def _make_parent(
        self,
        draft: DraftLike,
        calibration: CalibrationOptions,
        options: SolverOptions,
        own: Mapping[str, SolverOptions],
        windows: Tensor | None,
    ) -> dict[str, Any]:
        """Quantize all blocks into the draft; what the parent says about itself."""
        opened, width = self.opened, f" at {options.master_bits} bits" if self.config.method.dedicated else ""
        if "quantize" not in self.config.stages:
            raise UserError(f"The store has no such parent{width} yet; add quantize to stages, or check the settings.")
        place = opened.place(windows, 1 + len(calibration.streams))
        solver_device = machine.solver_device(self.device, self.warnings)
        if self.plan is None:
            self._announce(plan_quantizing(opened, calibration, options, windows, solver_device))
        if draft.resumed:
            log.info("resuming an unfinished parent%s from its last finished block", width)
        with self.bars.bar(f"quantize{width}", len(opened.names)) as progress:
            driver = Driver(
                opened.blocks,
                opened.layers,
                options,
                calibration,
                device=self.device,
                solver_device=solver_device,
                dtype=opened.dtype,
                place=place,
                overrides=own.get,
                process_group=self.process_group,
                progress=progress,
            )
            blocks = driver.run(draft, windows)
            self.phases.update(driver.phases.seconds)
        return {"label": f"{opened.loaded.label} {self.config.method.name}{width}", "blocks": blocks}

    def _search(self) -> list[SliceSpec]:
        """An allocation for each budget that is searched for."""
        search = self.config.search
        if self.opened.search_windows is None or self.parent is None:
            return []
        setting = Setting(
            blocks=self.opened.blocks,
            parent=self.parent,
            windows=self.opened.search_windows,
            device=self.device,
            dtype=self.opened.dtype,
            process_group=self.process_group,
        )
        with self.bars.bar(f"search {search.name}", len(search.budgets) + 1) as progress:
            searched = run_search(search, setting, self.store, progress)
        self.search_record = searched.record
        return [
            SliceSpec(name=row["file"], parent=self.parent, bits=found.widths, allocation=found)
            for row, found in zip(searched.record["front"], searched.allocations, strict=True)
        ]

    def _evaluate(self, variants: Sequence[SliceSpec]) -> dict[str, dict[str, Any]]:
        """For each dataset the metrics of ``full`` and of every variant."""
        by_name = {variant.name: variant for variant in variants}

        def weights_of(index: int, variant: str) -> dict[str, Tensor]:
            return by_name[variant].weights(index)

        measured = {}
        for name, windows in self.opened.evaluation.items():
            batch_size = self.config.eval.datasets[name].batch_size
            with self.bars.bar(f"evaluate on {name}", steps(self.opened.blocks, windows, list(by_name))) as progress:
                measured[name] = evaluate_slices(
                    self.opened.blocks,
                    windows,
                    weights_of,
                    list(by_name),
                    batch_size,
                    self.device,
                    progress,
                    self.opened.place(windows, 1 + len(by_name)),
                    self.process_group,
                )
        return measured

    def _evaluate_tasks(self, variants: Sequence[SliceSpec]) -> dict[str, Scores]:
        """The tasks' scores of ``full`` and of every variant; empty without tasks."""
        if self.tasks is None:
            return {}
        by_name = {variant.name: variant for variant in variants}
        with self.bars.bar("tasks", len(variants) + 1) as progress:
            return evaluate_tasks(
                self.tasks,
                self.opened.blocks,
                self.opened.loaded.tokenizer,
                lambda index, name: by_name[name].weights(index),
                list(by_name),
                limit=self.config.eval.limit,
                batch_size=self.config.eval.task_batch_size,
                device=self.device,
                progress=progress,
            )

    def _assemble(
        self, variants: Sequence[SliceSpec], measured: Mapping[str, dict[str, Any]], scores: Mapping[str, Scores]
    ) -> dict[str, Any]:
        return {
            "schema": 1,
            "model": self.opened.loaded.label,
            "method": self.config.method.name,
            "command": self.job.command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": self.job.resolved,
            "parent": outcome.describe_parents(variants),
            "baseline": {
                "bytes": self.opened.dense_bytes,
                "perplexity": {name: outcome.finite(m["full"].perplexity) for name, m in measured.items()},
                "tasks": scores.get("full", {}),
            },
            "slices": [outcome.slice_entry(variant, measured, scores) for variant in variants],
            "search": self.search_record,
            "seconds": self.seconds,
            "resources": {
                "plan": None if self.plan is None else dataclasses.asdict(self.plan),
                "quantize_seconds": {phase: round(seconds, 3) for phase, seconds in sorted(self.phases.items())},
                **self._peaks(),
            },
            "unquantized_parameters": self._left_alone(),
            "experts": [row for parent in dict.fromkeys(v.parent for v in variants) for row in parent.poor_experts()],
            "layers": outcome.layer_rows(variants),
            "warnings": list(dict.fromkeys(self.warnings)),
            "versions": outcome.versions(),
        }

    def _peaks(self) -> dict[str, int]:
        return {"host_peak": machine.host_peak(), "device_peak": machine.device_peak(self.device)}

    def _left_alone(self) -> list[dict[str, Any]]:
        blocks, quantized = self.opened.blocks, set(self.opened.names)
        every = {name for index in range(len(blocks)) for name in blocks.linears(index)}
        return unquantized_parameters(blocks, quantized, every - quantized)
