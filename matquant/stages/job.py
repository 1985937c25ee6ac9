"""One job: the stages one after the other, and what it writes."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from matquant import distributed, machine, report
from matquant.config import Config
from matquant.distributed import ProcessGroup
from matquant.formats import allocation
from matquant.formats.allocation import Allocation
from matquant.formats.slice_spec import SliceSpec
from matquant.models.summary import unquantized_parameters
from matquant.pack.stage import Packing
from matquant.report.output_files import write_atomic
from matquant.stages import generate as generating
from matquant.stages import results as results_
from matquant.stages.evaluate import Evaluation, evaluate, load_tasks, score_tasks
from matquant.stages.generate import generate
from matquant.stages.load import LoadedJob, load_job
from matquant.stages.plan import plan_without_quantize
from matquant.stages.quantize import quantize
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
        Mean of ``config.metric`` over the evaluated slices; None without evaluation, and on all processes but the main one, which
        alone writes.

    Raises:
        UserError: something in the config, model or texts cannot be used.
    """
    results = compute(config, info)
    if distributed.rank_from_env() > 0:
        return None
    report.write(results, info.folder)
    _write_allocations(results, info.folder)
    page = report.write_report(results, info.folder)
    if config.tracking.wandb:
        failure = report.track(results, config.tracking, info.folder, info.group, info.name)
        if failure is not None:  # the results are written already; now they also say what is missing
            results["warnings"].append(failure)
            report.write(results, info.folder)
            report.write_report(results, info.folder)
    console = Console()
    report.print_table(results, console)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    generating.show(results.get("generate"), console)
    if "pack" in results:
        console.print(f"packed: {results['pack']['folder']}", soft_wrap=True, highlight=False)
    return results_.figure(results, config.metric)


def compute(config: Config, info: JobInfo) -> dict[str, Any]:
    """Run all stages; write nothing but the store and packed folders.

    Returns:
        Results as in results.json; empty on all processes but the main one.

    Raises:
        UserError: something in the config, model or texts cannot be used.
    """
    machine.use_threads(config.runtime.threads)
    machine.tune_malloc()
    device = machine.device(config.runtime.device)
    with distributed.init_distributed(device) as process_group:
        return _run_stages(config, info, device, process_group)


def _run_stages(config: Config, info: JobInfo, device: torch.device, process_group: ProcessGroup) -> dict[str, Any]:
    runtime = Runtime.of(config, device, process_group)
    log = runtime.log
    with log.timed("load"):
        job = load_job(config, runtime)
        tasks = load_tasks(config)
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
        return {}
    with log.timed("tasks"):
        evaluation = Evaluation(metrics=metrics, scores=score_tasks(job, tasks, slices, runtime))
    results = _assemble(job, info, runtime, slices, evaluation, search_record)
    if packing is not None:
        with log.timed("pack"), runtime.bars.bar("pack", len(job.layer_names)) as progress:
            results["pack"] = packing.run(job.model, job.blocks, slices, results, progress)
    if "generate" in config.stages:
        with log.timed("generate"):
            results["generate"] = generate(job, slices, runtime)
        results["resources"] |= runtime.peaks()
    return results


def _assemble(
    job: LoadedJob,
    info: JobInfo,
    runtime: Runtime,
    slices: Sequence[SliceSpec],
    evaluation: Evaluation,
    search_record: dict[str, Any] | None,
) -> dict[str, Any]:
    log, metrics, scores = runtime.log, evaluation.metrics, evaluation.scores
    return {
        "schema": 1,
        "model": job.model.label,
        "method": job.config.method.name,
        "command": info.command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": info.resolved,
        "parent": results_.describe_parents(slices),
        "baseline": {
            "bytes": job.dense_bytes,
            "perplexity": {name: results_.finite(m["full"].perplexity) for name, m in metrics.items()},
            "tasks": scores.get("full", {}),
        },
        "slices": [results_.slice_entry(one, metrics, scores) for one in slices],
        "search": search_record,
        "seconds": log.seconds,
        "resources": {
            "plan": None if log.plan is None else dataclasses.asdict(log.plan),
            "quantize_seconds": {phase: round(seconds, 3) for phase, seconds in sorted(log.quantize_seconds.items())},
            **runtime.peaks(),
        },
        "unquantized": _unquantized(job),
        "experts": [row for parent in dict.fromkeys(one.parent for one in slices) for row in parent.poor_experts()],
        "layers": results_.layer_rows(slices),
        "warnings": list(dict.fromkeys(log.warnings)),
        "versions": results_.versions(),
    }


def _unquantized(job: LoadedJob) -> list[dict[str, Any]]:
    quantized = set(job.layer_names)
    every = {name for index in range(len(job.blocks)) for name in job.blocks.linears(index)}
    return unquantized_parameters(job.blocks, quantized, every - quantized)


def _write_allocations(results: Mapping[str, Any], folder: Path) -> None:
    """Write the allocations of a search as files that ``bits`` accepts."""
    entries = {entry.get("name"): entry for entry in results["slices"]}
    for row in results["search"]["front"] if results["search"] else []:
        entry = entries[row["file"]]
        about = dict(entry["allocation"])
        found = Allocation(
            widths=about.pop("widths"), average_bits=entry["average_bits"], bytes=entry["bytes"], about=about
        )
        write_atomic(folder / row["file"], allocation.to_yaml(found))
        write_atomic((folder / row["file"]).with_suffix(".txt"), allocation.to_text(found))
