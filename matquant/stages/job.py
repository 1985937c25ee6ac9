"""One job: the stages one after the other, and what it writes."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from matquant import distributed, machine, report
from matquant.config import Config
from matquant.distributed import ProcessGroup
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.pack.stage import Packing
from matquant.report.output_files import write_atomic
from matquant.report.results import JobResults
from matquant.stages import generate as generating
from matquant.stages.evaluate import Evaluation, evaluate, load_tasks, score_tasks
from matquant.stages.generate import generate
from matquant.stages.load import load_job
from matquant.stages.plan import plan_without_quantize
from matquant.stages.quantize import quantize
from matquant.stages.results import assemble, mean_figure, resources
from matquant.stages.runtime import Runtime
from matquant.stages.search import search


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

    Returns:
        Mean of ``config.metric`` over the evaluated slices; None without evaluation, and on all processes but the main one,
        which alone writes.

    Raises:
        UserError: something in the config, model or texts cannot be used.
    """
    results = compute(config, info)
    if results is None:
        return None
    report.write(results, info.folder)
    _write_allocations(results, info.folder)
    page = report.write_report(results, info.folder)
    if config.tracking.wandb:
        failure = report.track(results, config.tracking, info.folder, info.group, info.name)
        if failure is not None:  # the results are written already; now they also say what is missing
            results = dataclasses.replace(results, warnings=[*results.warnings, failure])
            report.write(results, info.folder)
            report.write_report(results, info.folder)
    console = Console()
    report.print_table(results, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    generating.show(results.generate, console)
    if results.pack is not None:
        console.print(f"packed: {results.pack['folder']}", soft_wrap=True, highlight=False)
    return mean_figure(results, config.metric)


def compute(config: Config, info: JobInfo) -> JobResults | None:
    """Run all stages; write nothing but the store and packed folders.

    Returns:
        Results; None on all processes but the main one.

    Raises:
        UserError: something in the config, model or texts cannot be used.
    """
    machine.use_threads(config.runtime.threads)
    machine.tune_malloc()
    device = machine.device(config.runtime.device)
    with distributed.init_distributed(device) as process_group:
        return _run_stages(config, info, device, process_group)


def _run_stages(config: Config, info: JobInfo, device: torch.device, process_group: ProcessGroup) -> JobResults | None:
    runtime = Runtime.of(config, device, process_group)
    log = runtime.log
    with log.timed("load"):
        job = load_job(config, runtime)
        tasks = load_tasks(job)
        packing = Packing(config.pack, job.layer_names, config.method, info.folder) if config.pack.wanted else None
    with log.timed("quantize"):
        quantized = quantize(job, runtime)
        if log.plan is None:
            runtime.announce(plan_without_quantize(job, runtime))
    with log.timed("search"):
        found, search_record = search(job, quantized, runtime)
    slices = [*quantized.slices, *found]
    with log.timed("evaluate"):
        metrics = evaluate(job, slices, runtime)
    if not process_group.is_main:
        return None
    with log.timed("tasks"):
        evaluation = Evaluation(metrics=metrics, scores=score_tasks(job, tasks, slices, runtime))
    results = assemble(job, runtime, slices, evaluation, search_record, command=info.command, resolved=info.resolved)
    if packing is not None:
        with log.timed("pack"), runtime.bars.bar("pack", len(job.layer_names)) as progress:
            packed = packing.run(job.model, job.blocks, slices, results.to_json(), progress)
        results = dataclasses.replace(results, pack=packed)
    if "generate" in config.stages:
        with log.timed("generate"):
            generated = generate(job, slices, runtime)
        results = dataclasses.replace(results, generate=generated, resources=resources(runtime))
    return results


def _write_allocations(results: JobResults, folder: Path) -> None:
    """Write the allocations of a search as files that ``bits`` accepts."""
    by_name = {one.name: one for one in results.slices}
    for row in results.search["front"] if results.search else []:
        one = by_name[row["file"]]
        about = dict(one.allocation or {})
        found = Allocation(bits=about.pop("bits"), average_bits=one.average_bits, bytes=one.bytes, about=about)
        write_atomic(folder / row["file"], allocation.to_yaml(found))
        write_atomic((folder / row["file"]).with_suffix(".txt"), allocation.to_text(found))
