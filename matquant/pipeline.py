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
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from matquant import generating, machine, outcome, plan, ranks, report
from matquant.config import Config, TextConfig
from matquant.data import texts
from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices, steps
from matquant.evaluate.tasks import Scores, Tasks, evaluate_tasks
from matquant.evaluate.variants import Variant
from matquant.models.activations import Place, choose_place
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.inventory import left_alone
from matquant.models.load import open_model
from matquant.models.probing import check
from matquant.models.shapes import measure
from matquant.nested import planes_read
from matquant.options import as_json, own_options, planned_weight, solver_options
from matquant.pack.stage import Packing
from matquant.plan import Calibrating, Need, Plan
from matquant.progress import Bars
from matquant.quantize.driver import CalibrationOptions, Driver, check_layers, layers_to_quantize
from matquant.quantize.parent import Parent
from matquant.quantize.solver import SolverOptions, compile_row_solver
from matquant.ranks import Ranks
from matquant.report.files import write_atomic
from matquant.search import allocation
from matquant.search.allocation import Allocation
from matquant.search.running import Setting
from matquant.search.stage import check_budgets
from matquant.search.stage import search as run_search
from matquant.store import Store
from matquant.store.together import AnyDraft, open_or_build

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
    if ranks.number() > 0:
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
    with ranks.joined(device) as together:
        return _Run(config, job, device, together).results()


class _Run:
    """The state that the stages of one job share."""

    def __init__(self, config: Config, job: Job, device: torch.device, ranks: Ranks) -> None:
        self.config = config
        self.job = job
        self.device = self.solver_device = device
        self.ranks = ranks
        self.bars = Bars(config.runtime.progress if ranks.first else False)
        self.seconds: dict[str, float] = {}
        self.phases: Counter[str] = Counter()  # seconds of quantizing by what was done
        self.warnings: list[str] = []
        self.store = Store(Path(config.store.path))
        with self._timed("load"):
            self.loaded = open_model(config.model)
            self.warnings += self.loaded.warnings
            self.blocks = BlockModel(self.loaded.model, self.loaded.checkpoint)
            self.parent: Parent | None = None  # of all widths, unless the method makes a model for each
            self.dtype = compute_dtype(self.loaded.dtype, self.device)
            self.layers = layers_to_quantize(self.blocks, config.method.skips, head=config.method.head)
            check_layers(self.layers, lambda name: config.method.of_layer(name).group_size or config.method.group_size)
            self._check_lengths()
            self.allocations = self._read_allocations()
            self.evaluation = self._evaluation_windows()
            check(self.blocks, self.device, self.dtype)
            self.shapes = measure(self.blocks, self.layers, self.loaded.dtype, self.dtype)
            self.plan: Plan | None = None
            asked = self.config.eval
            wanted = asked.tasks and "evaluate" in config.stages
            self.tasks = Tasks(asked.tasks, asked.task_folder, asked.fewshot) if wanted else None
            self.search_windows = None
            if self.config.search.wanted:
                self._check_budgets()
                search_text = self._search_text()
                self.search_windows = self._windows(search_text, "calibration")
            self.search_record: dict[str, Any] | None = None
            names = [name for block in self.layers for name in block]
            wanted = config.pack.wanted
            self.packing = Packing(config.pack, names, config.method, job.folder) if wanted else None

    def results(self) -> dict[str, Any]:
        with self._timed("quantize"):
            variants = self._quantize()
            self._make_plan(None, None, None)  # where nothing was left to quantize
        with self._timed("search"):
            variants += self._search()
        measured: dict[str, dict[str, Any]] = {}
        with self._timed("evaluate"):
            if "evaluate" in self.config.stages:
                measured = self._evaluate(variants)
        if not self.ranks.first:
            return {}
        with self._timed("tasks"):
            scores = self._evaluate_tasks(variants)
        results = self._assemble(variants, measured, scores)
        if self.packing is not None:
            with self._timed("pack"), self.bars.bar("pack", sum(map(len, self.layers))) as progress:
                results["pack"] = self.packing.run(self.loaded, self.blocks, variants, results, progress)
        if "generate" in self.config.stages:
            with self._timed("generate"):
                results["generate"] = generating.generate(
                    self.loaded, self.blocks, variants, str(self.config.prompt), self.config.max_new_tokens, self.device
                )
            results["resources"] |= self._peaks()
        return results

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def _check_lengths(self) -> None:
        """Refuse windows and a prompt that are longer than the model's context; texts that are not read may be as they like."""
        named = {} if self.config.method.solver == "rtn" else {"calibration": self.config.calibration}
        if self.config.search.wanted:
            named["search"] = self._search_text()
        if "evaluate" in self.config.stages:
            named |= {f"eval.datasets.{name}": text for name, text in self.config.eval.datasets.items()}
        longest = self.loaded.context_length
        for name, text in named.items():
            if longest is not None and text.sequence_length > longest:
                raise UserError(
                    f"{name}.sequence_length={text.sequence_length} is longer than the {longest} tokens that "
                    f"{self.loaded.label} was made for."
                )
            if text.sequences < self.ranks.count:
                raise UserError(f"{name}.sequences={text.sequences} cannot be shared by {self.ranks.count} processes.")
        if "generate" in self.config.stages and longest is not None:
            prompt, new = len(self.loaded.tokenizer(str(self.config.prompt))["input_ids"]), self.config.max_new_tokens
            if prompt + new > longest:
                raise UserError(
                    f"The prompt has {prompt} tokens; with max_new_tokens={new} that is more than the {longest} tokens that "
                    f"{self.loaded.label} was made for."
                )

    def _check_budgets(self) -> None:
        method = self.config.method
        options = solver_options(method, self.config.objective.lambdas, method.master_bits, self.loaded.dtype)
        own = own_options(method, [name for block in self.layers for name in block], options)
        check_budgets(
            self.config.search,
            [
                {name: planned_weight(layer.weight.shape, own.get(name, options)) for name, layer in block.items()}
                for block in self.layers
            ],
        )

    def _search_text(self) -> TextConfig:
        """Other windows of the calibration text than those that the parent is calibrated on."""
        search, text = self.config.search, self.config.calibration
        return dataclasses.replace(
            text, sequences=search.sequences, sequence_length=search.sequence_length,
            seed=None if text.seed is None else text.seed + 1 + search.seed,
        )  # fmt: skip

    def _evaluation_windows(self) -> dict[str, Tensor]:
        """Cut before any long work, so that a text that is missing or too short is refused at once."""
        if "evaluate" not in self.config.stages:
            return {}
        if self.config.method.solver != "rtn":
            texts.check_apart(self.config.calibration, dict(self.config.eval.datasets))
        return {name: self._windows(text, "evaluation") for name, text in self.config.eval.datasets.items()}

    def _windows(self, text: TextConfig, split: Literal["calibration", "evaluation"]) -> Tensor:
        return self.ranks.in_turn(lambda: texts.windows(text, split, self.loaded.tokenizer, self.store))

    def _read_allocations(self) -> dict[str, Allocation]:
        """The files among ``bits``, by path, held against the layers before any long work."""
        names = [name for block in self.layers for name in block]
        read = {path: allocation.read(Path(path)) for path in self.config.allocations}
        for path, found in read.items():
            allocation.check(found, names, self.config.method.master_bits, path)
        return read

    def _quantize(self) -> list[Variant]:
        """Each width and allocation to measure, with its parent: one and the same, or for a dedicated method one each."""
        method, widths = self.config.method, self.config.widths
        windows = None
        if method.solver != "rtn":
            windows = self._windows(self.config.calibration, "calibration")
        if method.dedicated:
            return [
                Variant(name=str(b), parent=self._open_parent(options, windows), widths=b)
                for b in widths
                for options in [solver_options(method, {b: 1.0}, b, self.loaded.dtype)]
            ]
        options = solver_options(method, self.config.objective.lambdas, method.master_bits, self.loaded.dtype)
        parent = self.parent = self._open_parent(options, windows)
        variants = [Variant(name=str(b), parent=parent, widths=b) for b in widths]
        for path, found in self.allocations.items():
            variants.append(Variant(name=path, parent=parent, widths=found.widths, allocation=found))
            self.warnings += outcome.changes(variants[-1])
        return variants

    def _open_parent(self, options: SolverOptions, windows: Tensor | None) -> Parent:
        method = self.config.method
        names = [name for block in self.layers for name in block]
        calibration = CalibrationOptions(
            streams=() if method.dedicated else method.streams, asymmetric=method.asymmetric, staged=method.staged,
            batch_size=self.config.calibration.batch_size,
        )  # fmt: skip
        if not calibration.streams:
            calibration = dataclasses.replace(calibration, streams=(options.master_bits,))
        inputs = {
            "model": self.loaded.fingerprint,
            "dtype": str(self.loaded.dtype),
            "calibration": None if windows is None else texts.fingerprint(windows),
            "options": as_json(options),
            "streams": None if windows is None else [list(calibration.streams), method.asymmetric, method.staged],
            "layers": names,
            "solver": _SOLVER_VERSION,
        }
        own = own_options(method, names, options)
        if own:
            inputs["overrides"] = {name: as_json(chosen) for name, chosen in own.items()}
        width = f" at {options.master_bits} bits" if method.dedicated else ""

        def build(draft: AnyDraft) -> dict[str, Any]:
            if "quantize" not in self.config.stages:
                raise UserError(
                    f"The store has no such parent{width} yet; add quantize to stages, or check the settings."
                )
            place = self._place(windows, 1 + len(calibration.streams))
            self.solver_device = machine.solver_device(self.device, self.warnings)
            self._make_plan(calibration, options, windows)
            if draft.resumed:
                log.info("resuming an unfinished parent%s from its last finished block", width)
            with self.bars.bar(f"quantize{width}", len(names)) as progress:
                driver = Driver(
                    self.blocks, self.layers, options, calibration, device=self.device,
                    solver_device=self.solver_device, dtype=self.dtype, place=place,
                    overrides=own.get, ranks=self.ranks, progress=progress,
                )  # fmt: skip
                blocks = driver.run(draft, windows)
                self.phases.update(driver.phases.seconds)
            return {"label": f"{self.loaded.label} {method.name}{width}", "blocks": blocks}

        artifact = open_or_build(self.store, self.ranks, "parent", inputs, build)
        parent = Parent(artifact)
        self.warnings += [*artifact.notes, *parent.notes()]
        return parent

    def _search(self) -> list[Variant]:
        """An allocation for each budget that is searched for."""
        search = self.config.search
        if self.search_windows is None or self.parent is None:
            return []
        setting = Setting(
            blocks=self.blocks, parent=self.parent, windows=self.search_windows, device=self.device, dtype=self.dtype,
            ranks=self.ranks,
        )  # fmt: skip
        with self.bars.bar(f"search {search.name}", len(search.budgets) + 1) as progress:
            searched = run_search(search, setting, self.store, progress)
        self.search_record = searched.record
        return [
            Variant(name=row["file"], parent=self.parent, widths=found.widths, allocation=found)
            for row, found in zip(searched.record["front"], searched.allocations, strict=True)
        ]

    def _evaluate(self, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
        """For each dataset the metrics of ``full`` and of every variant."""
        by_name = {variant.name: variant for variant in variants}

        def weights_of(index: int, variant: str) -> dict[str, Tensor]:
            return by_name[variant].weights(index)

        measured = {}
        for name, windows in self.evaluation.items():
            batch_size = self.config.eval.datasets[name].batch_size
            with self.bars.bar(f"evaluate on {name}", steps(self.blocks, windows, list(by_name))) as progress:
                measured[name] = evaluate_slices(
                    self.blocks, windows, weights_of, list(by_name), batch_size, self.device, progress,
                    self._place(windows, 1 + len(by_name)), self.ranks,
                )  # fmt: skip
        return measured

    def _make_plan(
        self, calibration: CalibrationOptions | None, options: SolverOptions | None, windows: Tensor | None
    ) -> None:
        """Say what quantizing (if there are options), measuring and generating need, and refuse what cannot fit; once in a
        job."""
        if self.plan is not None:
            return
        on_gpu, needs, total = self.device.type == "cuda", [], 0.0
        place: Place | None = self.device if self.evaluation else None
        if calibration is not None and options is not None:
            compile_row_solver()  # before memory is measured
            job = Calibrating(
                tokens=self._own_tokens(windows),
                batch=calibration.batch_size * (1 if windows is None else windows.shape[1]),
                streams=0 if windows is None else len(calibration.streams), widths=len(options.widths),
                asymmetric=calibration.asymmetric, staged=calibration.staged, group_size=options.group_size,
            )  # fmt: skip
            place = self._place(windows, 1 + len(calibration.streams))
            needs.append(
                plan.quantizing(
                    self.shapes, job, on_gpu=on_gpu, solver_on_gpu=self.solver_device.type == "cuda", place=place
                )
            )
            total += plan.operations(self.shapes, job, 0, 0)
        variants = len(self.config.widths) + len(self.allocations)
        for name, text in self.evaluation.items():
            batch, waiting = self.config.eval.datasets[name].batch_size, self._place(text, 1 + variants)
            needs.append(
                plan.measuring(
                    self.shapes, self._own_tokens(text), text.shape[1], batch, variants, on_gpu=on_gpu, place=waiting
                )
            )
            total += plan.operations(self.shapes, None, self._own_tokens(text), variants)
        if "generate" in self.config.stages:
            needs.append(self._generating(on_gpu))
            total += plan.operations(self.shapes, None, self.config.max_new_tokens, variants)
        if not needs:
            return
        self.plan = plan.make_plan(
            self.shapes, needs, total, device=self.device, place=place, store=self.store.path,
            group_size=self.config.method.group_size,
        )  # fmt: skip
        log.info(self.plan.sentence())
        if self.config.runtime.check_memory:
            self.plan.refuse()

    def _generating(self, on_gpu: bool) -> Need:
        method = self.config.method
        widths = [*self.config.widths, *(b for found in self.allocations.values() for b in found.widths.values())]
        most = method.master_bits if self.config.search.wanted else max(widths)
        prompt = len(self.loaded.tokenizer(str(self.config.prompt))["input_ids"])
        planes = planes_read(most, most if method.dedicated else method.master_bits, method.slicing)
        return plan.generating(
            self.shapes, planes, method.group_size, prompt, self.config.max_new_tokens, on_gpu=on_gpu
        )  # fmt: skip

    def _place(self, windows: Tensor | None, models: int) -> Place:
        """Where the hidden states of so many models wait between two blocks."""
        width = self.loaded.model.config.get_text_config().hidden_size
        needed = models * self._own_tokens(windows) * width * self.dtype.itemsize
        return choose_place(needed, self.device, self.store.path / "scratch")

    def _own_tokens(self, windows: Tensor | None) -> int:
        """How many tokens of these windows go through this process."""
        return 0 if windows is None else windows[self.ranks.share(len(windows))].numel()

    def _evaluate_tasks(self, variants: Sequence[Variant]) -> dict[str, Scores]:
        """The tasks' scores of ``full`` and of every variant; empty without tasks."""
        if self.tasks is None:
            return {}
        by_name = {variant.name: variant for variant in variants}
        with self.bars.bar("tasks", len(variants) + 1) as progress:
            return evaluate_tasks(
                self.tasks, self.blocks, self.loaded.tokenizer, lambda index, name: by_name[name].weights(index),
                list(by_name), limit=self.config.eval.limit, batch_size=self.config.eval.task_batch_size,
                device=self.device, progress=progress,
            )  # fmt: skip

    def _assemble(
        self,
        variants: Sequence[Variant],
        measured: Mapping[str, dict[str, Any]],
        scores: Mapping[str, Scores],
    ) -> dict[str, Any]:
        return {
            "schema": 1,
            "model": self.loaded.label,
            "method": self.config.method.name,
            "command": self.job.command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": self.job.resolved,
            "parent": outcome.describe_parents(variants),
            "baseline": {
                "bytes": self._dense_bytes(),
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
            "left_alone": self._left_alone(),
            "experts": [row for parent in dict.fromkeys(v.parent for v in variants) for row in parent.poor_experts()],
            "layers": outcome.layer_rows(variants),
            "warnings": list(dict.fromkeys(self.warnings)),
            "versions": outcome.versions(),
        }

    def _peaks(self) -> dict[str, int]:
        return {"host_peak": machine.host_peak(), "device_peak": machine.device_peak(self.device)}

    def _left_alone(self) -> list[dict[str, Any]]:
        quantized = {name for block in self.layers for name in block}
        every = {name for index in range(len(self.blocks)) for name in self.blocks.linears(index)}
        return left_alone(self.blocks, quantized, every - quantized)

    def _dense_bytes(self) -> int:
        """Bytes of the quantized layers in the model's own dtype."""
        return sum(m.weight.numel() for block in self.layers for m in block.values()) * self.loaded.dtype.itemsize
