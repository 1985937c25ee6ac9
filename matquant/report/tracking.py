"""Weights & Biases run of a job, offline unless ``WANDB_MODE`` says otherwise. A failure of tracking never fails the job."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matquant.number_format import is_number
from matquant.report.config import TrackingConfig
from matquant.report.results import JobResults, SliceResult, task_scores

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

MAPS = 6  # bit-width maps of allocations


def track(results: JobResults, config: TrackingConfig, folder: Path, group: str | None, name: str) -> str | None:
    """Record ``results`` as one wandb run under ``folder/wandb``.

    The run holds the config, the commit and the machine, tables of slices and layers, a history with one step per bit-width (x
    axis ``slice/bits``), summary figures such as ``kl/2``, the plots, and the report. ``config.group`` takes precedence over
    ``group``.

    Returns:
        None, or a sentence on why there is no run. It was logged as a warning; nothing is raised.
    """
    mode = os.environ.get("WANDB_MODE") or "offline"
    if not config.wandb or mode == "disabled":
        return None
    try:
        with _private_service(mode):
            _record(results, config, Path(folder), config.group or group, name, mode)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sentence = f"Weights & Biases did not record this run, everything else is in {folder}: {reason}"
        log.warning(sentence)
        return sentence
    return None


@contextmanager
def _private_service(mode: str) -> Iterator[None]:
    """Stop the wandb service and restore environment variables at the end.

    Offline, wandb's error reporting is switched off, since it would look up a host name.
    """
    before = {key: os.environ.get(key) for key in ("WANDB_SERVICE", "WANDB_ERROR_REPORTING")}
    if mode in ("offline", "dryrun"):
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        yield
    finally:
        if before["WANDB_SERVICE"] is None:
            _stop_service()
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _stop_service() -> None:
    try:
        import wandb

        wandb.teardown()
    except Exception as error:  # the run's files are complete by now
        log.debug("wandb.teardown: %s", error)


def _record(results: JobResults, config: TrackingConfig, folder: Path, group: str | None, name: str, mode: str) -> None:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)  # wandb would quietly write to /tmp instead
    run = wandb.init(
        project=config.project,
        name=name,
        group=group,
        tags=list(config.tags),
        dir=str(folder),
        mode=mode,  # type: ignore[arg-type]
        config={**results.config, "command": results.command, "versions": dict(results.versions)},
        reinit="create_new",  # a run of the caller's own stays the current one
        settings=wandb.Settings(
            silent=True, console="off", disable_code=True
        ),  # wandb records the commit and the machine itself
    )
    try:
        _log(run, results)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _log(run: "wandb.Run", results: JobResults) -> None:
    run.define_metric("slice/bits", hidden=True)
    run.define_metric("slice/*", step_metric="slice/bits", summary="none")
    if results.allocations:
        run.define_metric("allocation/bits", hidden=True)
        run.define_metric("allocation/*", step_metric="allocation/bits", summary="none")
    history = (results.search or {}).get("history") or []
    if history:
        run.define_metric("search/generation", hidden=True)
        run.define_metric("search/*", step_metric="search/generation", summary="min")
    run.log(_media(results), step=0)
    names = results.datasets
    for one in results.uniform:
        run.log({"slice/bits": one.bits} | _figures(one, names, "slice"), step=int(one.bits))
    mixed = [one for one in results.slices if one.is_allocation]
    after = (
        max((int(one.bits) for one in results.uniform), default=0) + 1
    )  # steps of their own, apart from the uniform slices
    for step, one in enumerate(mixed, after):
        run.log({"allocation/bits": one.position} | _figures(one, names, "allocation"), step=step)
    for step, entry in enumerate(history, after + len(mixed)):
        figures = {
            f"search/{key}/{entry['budget']}": entry[key] for key in ("loss", "evaluations", "tokens", "skipped")
        }
        run.log({"search/generation": entry["generation"]} | figures, step=step)
    _log_allocations(run, results)
    run.summary.update(summary(results))


def _log_allocations(run: "wandb.Run", results: JobResults) -> None:
    """Log all allocations of a job as one artifact, in the format of the files that ``bits`` accepts."""
    import wandb
    import yaml

    if not results.allocations:
        return
    artifact = wandb.Artifact(f"allocation-{run.id}", type="allocation")
    for one in results.allocations:
        with artifact.new_file(f"{Path(one.name or 'allocation').stem}.yaml") as file:
            file.write(yaml.safe_dump({"kind": "allocation", **(one.allocation or {})}, sort_keys=False))
    run.log_artifact(artifact)


def _figures(one: SliceResult, names: list[str], prefix: str) -> dict[str, float]:
    figures: dict[str, Any] = {f"{prefix}/{m}/{n}": one.figure(m, n) for m in ("kl", "perplexity") for n in names}
    figures |= {f"{prefix}/tasks/{task}": value for task, value in task_scores(one.tasks).items()}
    figures |= {f"{prefix}/average_bits": one.average_bits, f"{prefix}/bytes": one.bytes}
    return {key: value for key, value in figures.items() if is_number(value)}


def summary(results: JobResults) -> dict[str, Any]:
    """Figures that a dashboard compares runs by: ``kl/2`` and ``perplexity/2`` are means over the datasets."""
    figures: dict[str, Any] = {"model": results.model, "method": results.method}
    for one in results.slices:
        for measure in ("kl", "perplexity"):
            values = [value for value in getattr(one, measure).values() if is_number(value)]
            if values:
                figures[f"{measure}/{one.bits}"] = fmean(values)
        figures[f"bytes/{one.bits}"] = one.bytes
    figures |= {f"baseline/perplexity/{name}": value for name, value in results.baseline.perplexity.items()}
    figures |= {f"seconds/{name}": value for name, value in results.seconds.items()}
    figures |= {f"memory/{name}": results.resources.get(name) for name in ("host_peak", "device_peak")}
    search = results.search or {}
    figures |= {
        f"search/{name}": search.get(name) for name in ("seconds", "evaluations_per_second", "tokens_per_second")
    }
    models = results.parent.stored
    figures["parent/bytes"] = sum(model.bytes for model in models if model.bytes is not None)
    figures["parent/reused"] = bool(models) and all(model.reused for model in models)
    figures["parent/sha256"] = results.parent.sha256
    return {key: value for key, value in figures.items() if value is not None}


def _media(results: JobResults) -> dict[str, Any]:
    """Tables, plots and the report, as types of wandb."""
    import wandb
    from PIL import Image

    from matquant.report.allocation_plots import bits_figure, generations_figure
    from matquant.report.drawing import to_png
    from matquant.report.heatmap import error_bits, layer_figure
    from matquant.report.html import render
    from matquant.report.plots import job_figures

    media: dict[str, Any] = {"slices": _slices_table(results), "report": wandb.Html(render(results), inject=False)}
    if results.layers:
        media["layers"] = _layers_table(results)
    drawings = dict(job_figures(results))
    for index, one in enumerate(results.allocations[:MAPS]):
        drawing = bits_figure(one, results.layers)
        drawings |= {f"allocation_{index}": drawing} if drawing is not None else {}
    drawing = generations_figure(results.search or {})
    drawings |= {"generations": drawing} if drawing is not None else {}
    for bits in error_bits(results.layers):
        drawing = layer_figure(results.layers, bits)
        drawings |= {f"layer_error_{bits}": drawing} if drawing is not None else {}
    return media | {f"plots/{n}": wandb.Image(Image.open(io.BytesIO(to_png(d)))) for n, d in drawings.items()}


def _slices_table(results: JobResults) -> "wandb.Table":
    """Table of the slices. Bits are texts, since wandb needs one type per column and an allocation has no number."""
    import wandb

    names = results.datasets
    columns: list[str | int] = ["bits", "average_bits", "bytes"]
    columns += [f"{measure}_{name}" for measure in ("perplexity", "kl") for name in names]
    rows: list[list[Any]] = [["full", None, results.baseline.bytes]]
    rows[0] += [results.baseline.perplexity.get(name) for name in names] + [None for _ in names]
    rows += [
        [str(one.bits), one.average_bits, one.bytes]
        + [getattr(one, measure).get(name) for measure in ("perplexity", "kl") for name in names]
        for one in results.slices
    ]
    return wandb.Table(columns=columns, data=rows)


def _layers_table(results: JobResults) -> "wandb.Table":
    import wandb

    from matquant.report.heatmap import error_bits

    bits = error_bits(results.layers)
    rows = [
        [layer.name, layer.block, layer.parameters, *(layer.error.get(one) for one in bits)] for layer in results.layers
    ]
    return wandb.Table(columns=["name", "block", "parameters", *(f"error_{one}" for one in bits)], data=rows)
