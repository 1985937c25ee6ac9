"""One job: its stages in order, and its outputs."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from matquant import distributed, machine, report
from matquant.config import Config
from matquant.distributed import SINGLE_PROCESS
from matquant.evaluate.tasks import Tasks
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.pack.stage import Packing, try_target
from matquant.report.next_commands import next_commands
from matquant.report.output_files import write_atomic
from matquant.report.results import FILE_NAME, JobResults
from matquant.stages import generate as generating
from matquant.stages.evaluate import evaluate, evaluate_weights, load_tasks, score_tasks
from matquant.stages.generate import generate
from matquant.stages.load import LoadedJob, load_job
from matquant.stages.plan import plan_without_quantize
from matquant.stages.quantize import quantize
from matquant.stages.refine import refine
from matquant.stages.results_builder import StageOutputs, assemble, failure_record, mean_figure, resources
from matquant.stages.runtime import Runtime
from matquant.stages.search import search
from matquant.store.files import translate_os_errors, try_writing
from matquant.version import version

_RUN_FOLDER = "hydra.run.dir"  # setting of the output folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobInfo:
    """Output folder and names of a job.

    Attributes:
        folder: for results, report and allocations.
        command: command line that runs the same job.
        name, group: of the wandb run.
        resolved: the composed config as plain containers.
    """

    folder: Path
    command: str
    name: str
    group: str | None
    resolved: Any


def run_job(config: Config, info: JobInfo) -> float | None:
    """Run all stages of one job, and write and show its results.

    If a stage fails, the results of the stages before it are written and shown, with the name of the failed stage.

    Returns:
        Mean of ``config.metric`` over the evaluated slices; None without evaluation, and on all processes but the main one,
        which alone writes.

    Raises:
        UserError: something in the config, model or texts cannot be used, or an output cannot be written.
    """
    results = compute(config, info, lambda partial: _publish_partial(partial, info.folder))
    if results is None:
        return None
    try:
        page = _write(results, info.folder)
    except Exception:
        report.print_table(results, Console())  # else the figures would be lost
        raise
    if config.tracking.wandb:
        failure = report.track(results, config.tracking, info.folder, info.group, info.name)
        if failure is not None:  # written again, with a sentence on the missing wandb run
            results = dataclasses.replace(results, warnings=[*results.warnings, failure])
            _write(results, info.folder)
    _show(results, page, Console())
    if info.group is None:  # the command of a job of a sweep would begin the sweep again
        _show_next(results, Console())
    return mean_figure(results, config.metric)


def compute(
    config: Config, info: JobInfo, on_failure: Callable[[JobResults], None] = lambda _: None
) -> JobResults | None:
    """Run all stages; write nothing but the store and packed folders.

    Args:
        on_failure: called with the results so far if a stage after quantize fails, before the error is raised.

    Returns:
        Results; None on all processes but the main one.

    Raises:
        UserError: something in the config, model or texts cannot be used, or an output cannot be written.
    """
    version()  # reads it now: the commit may move while the job runs
    machine.use_threads(config.runtime.threads)
    machine.tune_malloc()
    device = machine.device(config.runtime.device)
    with distributed.init_distributed(device) as process_group:
        runtime = Runtime.of(config, device, process_group)
        if process_group.is_main:
            _try_outputs(config, runtime, info.folder)
        return _run_stages(config, info, runtime, on_failure)


def _try_outputs(config: Config, runtime: Runtime, folder: Path) -> None:
    """Refuse outputs that cannot be written, before any work."""
    try_writing(folder, _RUN_FOLDER)
    if config.tracking.wandb:
        try_writing(folder / "wandb", _RUN_FOLDER)
    runtime.store.try_writing()
    if config.pack.wanted:
        try_target(config.pack, folder)


def _run_stages(
    config: Config, info: JobInfo, runtime: Runtime, on_failure: Callable[[JobResults], None]
) -> JobResults | None:
    log = runtime.log
    with log.timed("load"):
        job = load_job(config, runtime)
        tasks = load_tasks(job)
        packing = None
        if config.pack.wanted:
            uniform = () if config.allocations or config.search.wanted else config.slice_bits
            packing = Packing(config.pack, job.layer_specs, config.method, info.folder, job.model, uniform)
    outputs, results = StageOutputs(), None
    try:
        _quantize_and_evaluate(job, tasks, runtime, outputs)
        if not runtime.process_group.is_main:
            return None
        results = assemble(job, runtime, outputs, command=info.command, resolved=info.resolved)
        if packing is not None:
            with log.timed("pack"):
                results = dataclasses.replace(results, pack=_pack(job, packing, outputs, results, runtime))
        if "generate" in config.stages:
            with log.timed("generate"):
                generated = generate(job, outputs.slices, runtime)
            results = dataclasses.replace(results, generate=generated, resources=resources(runtime))
        return results
    except BaseException as error:
        if runtime.process_group.is_main and outputs.slices:
            partial = results or assemble(job, runtime, outputs, command=info.command, resolved=info.resolved)
            on_failure(dataclasses.replace(partial, failure=failure_record(log.stage, error)))
        raise


def _pack(
    job: LoadedJob, packing: Packing, outputs: StageOutputs, results: JobResults, runtime: Runtime
) -> dict[str, Any]:
    """Pack; and evaluate the packed weights if they differ from the slice. Returns the record for the results."""
    with runtime.bars.bar("pack", len(job.layer_names)) as progress:
        packed = packing.run(job.model, job.blocks, outputs.slices, results.to_json(), progress)
    stored = packing.stored_weights
    if stored is not None:
        measured = dict(evaluate_weights(job, lambda index, _: stored(index), ["packed"], runtime, SINGLE_PROCESS))
        if measured:
            packed["perplexity"] = {name: models["packed"].perplexity for name, models in measured.items()}
            packed["kl"] = {name: models["packed"].kl for name, models in measured.items()}
    return packed


def _quantize_and_evaluate(job: LoadedJob, tasks: Tasks | None, runtime: Runtime, outputs: StageOutputs) -> None:
    """Run the stages quantize, refine, search and evaluate; fill ``outputs`` as they finish."""
    log = runtime.log
    with log.timed("quantize"):
        quantized = quantize(job, runtime)
        if log.plan is None:
            runtime.announce(plan_without_quantize(job, runtime))
        outputs.slices = list(quantized.slices)
    with log.timed("refine"):
        quantized, outputs.refine = refine(job, quantized, runtime)
        outputs.slices = list(quantized.slices)
    with log.timed("search"):
        found, outputs.search = search(job, quantized, runtime)
        outputs.slices += found
    with log.timed("evaluate"):
        for dataset, metrics in evaluate(job, outputs.slices, runtime):
            outputs.metrics[dataset] = metrics
    if runtime.process_group.is_main:
        with log.timed("tasks"):
            for name, scores in score_tasks(job, tasks, outputs.slices, runtime):
                outputs.scores[name] = scores


def _publish_partial(results: JobResults, folder: Path) -> None:
    """Write and show the results of a job that failed. A second error is logged, since the first one is raised."""
    try:
        _show(results, _write(results, folder), Console())
    except Exception:
        logger.exception("the results so far cannot be written")


def _write(results: JobResults, folder: Path) -> Path:
    """Write results.json, the allocations and the report; return the path of the report."""
    with translate_os_errors(folder / FILE_NAME, setting=_RUN_FOLDER):
        report.write(results, folder)
        _write_allocations(results, folder)
        return report.write_report(results, folder)


def _show(results: JobResults, page: Path, console: Console) -> None:
    report.print_table(results, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False, markup=False)
    generating.show(results.generate, console)
    if results.pack is not None:
        console.print(f"packed: {results.pack['folder']}", soft_wrap=True, highlight=False, markup=False)


def _show_next(results: JobResults, console: Console) -> None:
    for purpose, command in next_commands(results):
        console.print(f"next, {purpose}: {command}", soft_wrap=True, highlight=False, markup=False, style="dim")


def _write_allocations(results: JobResults, folder: Path) -> None:
    """Write the allocations of a search as files that ``bits`` accepts."""
    by_name = {one.name: one for one in results.slices}
    for row in results.search["front"] if results.search else []:
        one = by_name[row["file"]]
        about = dict(one.allocation or {})
        found = Allocation(bits=about.pop("bits"), average_bits=one.average_bits, bytes=one.bytes, about=about)
        write_atomic(folder / row["file"], allocation.to_yaml(found))
        write_atomic((folder / row["file"]).with_suffix(".txt"), allocation.to_text(found))
