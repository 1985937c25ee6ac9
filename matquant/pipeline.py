"""The stages of one job, from a typed config to what stands in its folder.

    model, calibration text ──► quantize ──► parent (in the store) ──► evaluate ──► results.json, report.html, wandb

The objective decides the parent; ``bits`` only decides which slices are measured, so jobs that differ in ``bits`` alone
share one parent. A dedicated method makes one model per width instead.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from rich.console import Console
from torch import Tensor

from matquant import generating, machine, plan, report
from matquant.config import Config, MethodConfig, TextConfig
from matquant.data import texts
from matquant.errors import UserError
from matquant.evaluate.metrics import Metrics
from matquant.evaluate.slices import evaluate_slices, steps
from matquant.evaluate.tasks import Scores, Tasks, evaluate_tasks, recovery
from matquant.evaluate.variants import Variant
from matquant.models.activations import Place, choose_place
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.inventory import left_alone
from matquant.models.load import open_model
from matquant.models.shapes import measure
from matquant.pack.stage import Packing
from matquant.plan import Calibrating, Plan
from matquant.progress import Bars
from matquant.quantize.driver import CalibrationOptions, Driver, check_layers, layers_to_quantize
from matquant.quantize.parent import Parent
from matquant.quantize.solver import SolverOptions, compile_row_solver
from matquant.report.files import write_atomic
from matquant.search import allocation
from matquant.search.allocation import Allocation
from matquant.search.stage import Setting
from matquant.search.stage import search as run_search
from matquant.store import Artifact, Draft, Store

log = logging.getLogger(__name__)

# Part of a parent's key: raised when the same settings would give other codes than before.
_SOLVER_VERSION = 2

_VERSIONS = ("matquant", "torch", "transformers", "numpy", "numba", "datasets", "hydra-core")


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
        The mean over the measured slices of ``config.metric``, or None without evaluation.

    Raises:
        UserError: something in the config, model or text cannot be worked with.
    """
    results = compute(config, job)
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
    return _figure(results, config.metric)


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

    Raises:
        UserError: something in the config, model or text cannot be worked with.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        numba.set_num_threads(min(config.runtime.threads, most))
    return _Run(config, job).results()


class _Run:
    """The state that the stages of one job share."""

    def __init__(self, config: Config, job: Job) -> None:
        self.config = config
        self.job = job
        self.bars = Bars(config.runtime.progress)
        self.seconds: dict[str, float] = {}
        self.phases: Counter[str] = Counter()  # seconds of quantizing by what was done
        self.warnings: list[str] = []
        self.store = Store(Path(config.store.path))
        with self._timed("load"):
            self.device = _device(config.runtime.device)
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
            self.blocks.check(self.device, self.dtype)
            self.shapes = measure(self.blocks, self.layers, self.loaded.dtype, self.dtype)
            self.plan: Plan | None = None
            asked = self.config.eval
            wanted = asked.tasks and "evaluate" in config.stages
            self.tasks = Tasks(asked.tasks, asked.task_folder, asked.fewshot) if wanted else None
            self.search_windows = None
            if self.config.search.wanted:
                search_text = self._search_text()
                self.search_windows = texts.windows(search_text, "calibration", self.loaded.tokenizer, self.store)
            self.search_record: dict[str, Any] | None = None
            names = [name for block in self.layers for name in block]
            wanted = config.pack.wanted
            self.packing = Packing(config.pack, names, config.method, job.folder) if wanted else None

    def results(self) -> dict[str, Any]:
        with self._timed("quantize"):
            variants = self._quantize()
        with self._timed("search"):
            variants += self._search()
        measured: dict[str, dict[str, Any]] = {}
        with self._timed("evaluate"):
            if "evaluate" in self.config.stages:
                measured = self._evaluate(variants)
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
        return results

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def _check_lengths(self) -> None:
        """Refuse windows that are longer than the model's context; texts that are not read may be as they like."""
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
        tokenizer = self.loaded.tokenizer
        return {n: texts.windows(t, "evaluation", tokenizer, self.store) for n, t in self.config.eval.datasets.items()}

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
            windows = texts.windows(self.config.calibration, "calibration", self.loaded.tokenizer, self.store)
        if method.dedicated:
            return [
                Variant(name=str(b), parent=self._open_parent(options, windows), widths=b)
                for b in widths
                for options in [_options(method, {b: 1.0}, b, self.loaded.dtype)]
            ]
        options = _options(method, self.config.objective.lambdas, method.master_bits, self.loaded.dtype)
        parent = self.parent = self._open_parent(options, windows)
        variants = [Variant(name=str(b), parent=parent, widths=b) for b in widths]
        for path, found in self.allocations.items():
            variants.append(Variant(name=path, parent=parent, widths=found.widths, allocation=found))
            self.warnings += _changes(variants[-1])
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
            "options": _plain(options),
            "streams": None if windows is None else [list(calibration.streams), method.asymmetric, method.staged],
            "layers": names,
            "solver": _SOLVER_VERSION,
        }
        own = _own_options(method, names, options)
        if own:
            inputs["overrides"] = {name: _plain(chosen) for name, chosen in own.items()}
        width = f" at {options.master_bits} bits" if method.dedicated else ""

        def build(draft: Draft) -> dict[str, Any]:
            if "quantize" not in self.config.stages:
                raise UserError(
                    f"The store has no such parent{width} yet; add quantize to stages, or check the settings."
                )
            place = self._place(windows, 1 + len(calibration.streams))
            self._make_plan(calibration, options, windows)
            if draft.resumed:
                log.info("resuming an unfinished parent%s from its last finished block", width)
            with self.bars.bar(f"quantize{width}", len(names)) as progress:
                driver = Driver(
                    self.blocks, self.layers, options, calibration, device=self.device,
                    solver_device=_solver_device(self.device, self.warnings), dtype=self.dtype, place=place,
                    overrides=own.get, progress=progress,
                )  # fmt: skip
                blocks = driver.run(draft, windows)
                self.phases.update(driver.seconds)
            return {"label": f"{self.loaded.label} {method.name}{width}", "blocks": blocks}

        artifact = self.store.open_or_build("parent", inputs, build)
        parent = Parent(artifact)
        self.warnings += [*artifact.notes, *parent.notes()]
        return parent

    def _search(self) -> list[Variant]:
        """An allocation for each budget that is searched for."""
        search = self.config.search
        if self.search_windows is None or self.parent is None:
            return []
        setting = Setting(
            blocks=self.blocks, parent=self.parent, windows=self.search_windows, device=self.device, dtype=self.dtype
        )
        with self.bars.bar(f"search {search.name}", len(search.budgets) + 1) as progress:
            outcome = run_search(search, setting, self.store, progress)
        self.search_record = outcome.record
        return [
            Variant(name=row["file"], parent=self.parent, widths=found.widths, allocation=found)
            for row, found in zip(outcome.record["front"], outcome.allocations, strict=True)
        ]

    def _evaluate(self, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
        """For each dataset the metrics of ``full`` and of every variant."""
        by_name = {variant.name: variant for variant in variants}

        def weights_of(index: int, variant: str) -> dict[str, Tensor]:
            return by_name[variant].weights(index)

        if self.plan is None:
            self._make_plan(None, None, None)
        measured = {}
        for name, windows in self.evaluation.items():
            batch_size = self.config.eval.datasets[name].batch_size
            with self.bars.bar(f"evaluate on {name}", steps(self.blocks, windows, list(by_name))) as progress:
                measured[name] = evaluate_slices(
                    self.blocks, windows, weights_of, list(by_name), batch_size, self.device, progress,
                    self._place(windows, 1 + len(by_name)),
                )  # fmt: skip
        return measured

    def _make_plan(
        self, calibration: CalibrationOptions | None, options: SolverOptions | None, windows: Tensor | None
    ) -> None:
        """Say what quantizing (if there are options) and measuring need, and refuse what cannot fit; once in a job."""
        if self.plan is not None:
            return
        on_gpu, needs, total = self.device.type == "cuda", [], 0.0
        place: Place = self.device
        if calibration is not None and options is not None:
            compile_row_solver()  # before memory is measured
            job = Calibrating(
                tokens=0 if windows is None else windows.numel(),
                batch=calibration.batch_size * (1 if windows is None else windows.shape[1]),
                streams=0 if windows is None else len(calibration.streams), widths=len(options.widths),
                asymmetric=calibration.asymmetric, staged=calibration.staged, group_size=options.group_size,
            )  # fmt: skip
            place = self._place(windows, 1 + len(calibration.streams))
            needs.append(plan.quantizing(self.shapes, job, on_gpu=on_gpu, place=place))
            total += plan.operations(self.shapes, job, 0, 0)
        variants = len(self.config.widths) + len(self.allocations)
        for name, text in self.evaluation.items():
            batch, waiting = self.config.eval.datasets[name].batch_size, self._place(text, 1 + variants)
            needs.append(
                plan.measuring(self.shapes, text.numel(), text.shape[1], batch, variants, on_gpu=on_gpu, place=waiting)
            )
            total += plan.operations(self.shapes, None, text.numel(), variants)
        self.plan = plan.make_plan(
            self.shapes, needs, total, device=self.device, place=place, store=self.store.path,
            group_size=self.config.method.group_size,
        )  # fmt: skip
        log.info(self.plan.sentence())
        if self.config.runtime.check_memory:
            self.plan.refuse()

    def _place(self, windows: Tensor | None, models: int) -> Place:
        """Where the hidden states of so many models wait between two blocks."""
        width = self.loaded.model.config.get_text_config().hidden_size
        needed = 0 if windows is None else models * windows.numel() * width * self.dtype.itemsize
        return choose_place(needed, self.device, self.store.path / "scratch")

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
            "parent": _describe(variants),
            "baseline": {
                "bytes": self._dense_bytes(),
                "perplexity": {name: _finite(m["full"].perplexity) for name, m in measured.items()},
                "tasks": scores.get("full", {}),
            },
            "slices": [_slice(variant, measured, scores) for variant in variants],
            "search": self.search_record,
            "seconds": self.seconds,
            "resources": {
                "plan": None if self.plan is None else dataclasses.asdict(self.plan),
                "quantize_seconds": {phase: round(seconds, 3) for phase, seconds in sorted(self.phases.items())},
                "host_peak": machine.host_peak(),
                "device_peak": machine.device_peak(self.device),
            },
            "left_alone": self._left_alone(),
            "experts": [row for parent in dict.fromkeys(v.parent for v in variants) for row in parent.poor_experts()],
            "layers": _layer_rows(variants),
            "warnings": list(dict.fromkeys(self.warnings)),
            "versions": _versions(),
        }

    def _left_alone(self) -> list[dict[str, Any]]:
        quantized = {name for block in self.layers for name in block}
        every = {name for index in range(len(self.blocks)) for name in self.blocks.linears(index)}
        return left_alone(self.blocks, quantized, every - quantized)

    def _dense_bytes(self) -> int:
        """Bytes of the quantized layers in the model's own dtype."""
        return sum(m.weight.numel() for block in self.layers for m in block.values()) * self.loaded.dtype.itemsize


def _solver_device(device: torch.device, warnings: list[str]) -> torch.device:
    """Where layers are solved: on the GPU that runs the model, if CuPy can compile the solver's kernels for it."""
    if device.type == "cuda" and importlib.util.find_spec("cupy") is None:
        warnings.append(
            "Layers were solved on the CPU, which takes far longer, since CuPy is not installed. Install the extra gpu13 "
            "(CUDA 13) or gpu (CUDA 12): pip install '.[gpu13]'."
        )
        return torch.device("cpu")
    return device


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device={name} is no device; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device={name}: this machine has {torch.cuda.device_count()} CUDA devices. Use cpu or auto."
        )
    return device


def _options(method: MethodConfig, weights: Mapping[int, float], master_bits: int, dtype: torch.dtype) -> SolverOptions:
    """Solver options; only the ratios of the weights matter, so the largest is made 1."""
    largest = max(weights.values())
    return SolverOptions(
        weights={bits: weight / largest for bits, weight in sorted(weights.items()) if weight > 0},
        master_bits=master_bits,
        slicing=method.slicing,
        feedback=method.feedback,
        group_size=method.group_size,
        symmetric=method.symmetric,
        offset=method.offset * 2.0 ** (master_bits - 8) if method.symmetric else 0.0,
        scale=method.scale,
        act_order=method.act_order,
        sweeps=method.sweeps,
        damp=method.damp,
        block_size=method.block_size,
        scale_dtype=torch.float16 if dtype == torch.float32 else dtype,
    )


def _own_options(method: MethodConfig, names: Iterable[str], options: SolverOptions) -> dict[str, SolverOptions]:
    """The options of the layers that have some of their own; layers of one pattern share the object."""
    made: dict[int, SolverOptions] = {}
    found = {}
    for name in names:
        layer = method.of_layer(name)
        if (layer.group_size, layer.weights) == (None, None):
            continue
        if id(layer) not in made:
            weights = dict(options.weights)
            if layer.weights is not None and not method.dedicated:
                largest = max(layer.weights.values())
                weights = {bits: weight / largest for bits, weight in sorted(layer.weights.items()) if weight > 0}
            group_size = layer.group_size or options.group_size
            made[id(layer)] = dataclasses.replace(options, weights=weights, group_size=group_size)
        found[name] = made[id(layer)]
    return found


def _plain(options: SolverOptions) -> dict[str, Any]:
    """The options as JSON can hold them."""
    plain = dataclasses.asdict(options)
    return plain | {"weights": {str(b): w for b, w in options.weights.items()}, "scale_dtype": str(options.scale_dtype)}


def _describe(variants: Sequence[Variant]) -> dict[str, Any]:
    """The parent as results name it; for a dedicated method the sum of its models, and each of them."""
    described = {variant.name: _describe_artifact(variant.parent.artifact) for variant in variants}
    models = list({d["sha256"]: d for d in described.values()}.values())
    if len(models) == 1:
        return models[0]
    together = hashlib.sha256("".join(sorted(m["sha256"] for m in models)).encode()).hexdigest()
    return {
        "path": str(Path(models[0]["path"]).parent),
        "sha256": together,
        "bytes": sum(m["bytes"] for m in models),
        "reused": all(m["reused"] for m in models),
        "models": described,
    }


def _describe_artifact(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), "sha256": artifact.sha256, "bytes": artifact.bytes, "reused": artifact.reused}


def _slice(
    variant: Variant, measured: Mapping[str, Mapping[str, Metrics]], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    found = {name: metrics[variant.name] for name, metrics in measured.items()}
    entry: dict[str, Any] = {"bits": variant.widths if isinstance(variant.widths, int) else report.ALLOCATION}
    if variant.allocation is not None:
        entry["name"] = variant.name
        entry["allocation"] = {**variant.allocation.about, "widths": dict(variant.allocation.widths)}
    return entry | {
        "average_bits": variant.average_bits(),
        "bytes": variant.bytes_read(),
        "perplexity": {name: _finite(m.perplexity) for name, m in found.items()},
        "kl": {name: _finite(m.kl) for name, m in found.items()},
        "top1_agreement": {name: m.top1_agreement for name, m in found.items()},
        "tasks": scores.get(variant.name, {}),
        "recovery": recovery(scores[variant.name], scores["full"]) if scores else {},
    }


def _changes(variant: Variant) -> list[str]:
    """What an allocation's file says of itself and what no longer holds, because it was edited or for another parent."""
    recorded, notes = variant.allocation, []
    if recorded is None:
        return []
    average, parent = variant.average_bits(), recorded.about.get("parent")
    if recorded.average_bits is not None and abs(recorded.average_bits - average) > 1e-4:
        notes.append(
            f"{variant.name} says {recorded.average_bits:g} bits on average, but its widths make {average:g}: it was edited, "
            "and the losses that it records are of what it was."
        )
    if parent is not None and parent != variant.parent.artifact.sha256:
        notes.append(f"{variant.name} was found for another parent ({str(parent)[:12]}); it is measured on this one.")
    return notes


def _finite(value: float) -> float | None:
    """JSON has no infinity: what overflowed counts as not measurable."""
    return value if math.isfinite(value) else None


def _layer_rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """A row per layer, with the errors of all models that were made for different widths."""
    rows: dict[str, dict[str, Any]] = {}
    for parent in dict.fromkeys(variant.parent for variant in variants):
        for row in parent.layer_errors():
            known = rows.setdefault(row["name"], row | {"error": {}})
            known["error"] |= row["error"]
    return list(rows.values())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _figure(results: Mapping[str, Any], metric: str) -> float | None:
    """The mean of one metric over slices and datasets, for a sweeper to minimise."""
    values = [value for entry in results["slices"] for value in entry[metric].values()]
    return sum(math.inf if v is None else v for v in values) / len(values) if values else None
