"""One Weights & Biases run per job, offline unless ``WANDB_MODE`` says otherwise. Tracking never fails a job."""

import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matquant.report.allocation_plots import allocations
from matquant.report.results import (
    ALLOCATION,
    Results,
    datasets,
    is_number,
    normalized,
    parents,
    slice_position,
    task_scores,
)

if TYPE_CHECKING:
    import wandb

    from matquant.config import TrackingConfig

log = logging.getLogger(__name__)

_MAPS = 6  # drawings of allocations


def track(results: Results, config: "TrackingConfig", folder: Path, group: str | None, name: str) -> str | None:
    """Record ``results`` as one wandb run under ``folder/wandb``.

    The run holds the config, the commit and the machine, tables of slices and layers, a history with one step per width
    (x axis ``slice/bits``), summary figures such as ``kl/2``, the plots, and the report. ``config.group`` goes before
    ``group``.

    Returns:
        None, or one sentence that says why there is no run; it was logged as a warning, and nothing is raised.
    """
    mode = os.environ.get("WANDB_MODE") or "offline"
    if not config.wandb or mode == "disabled":
        return None
    try:
        with _private_service(mode):
            _record(normalized(results), config, Path(folder), config.group or group, name, mode)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sentence = f"Weights & Biases did not record this run, everything else is in {folder}: {reason}"
        log.warning(sentence)
        return sentence
    return None


@contextmanager
def _private_service(mode: str) -> Iterator[None]:
    """Leave no wandb process and no environment variable behind that was not there before.

    Offline, wandb's error reporting is off meanwhile: it would look up a host name.
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


def _record(
    results: dict[str, Any], config: "TrackingConfig", folder: Path, group: str | None, name: str, mode: str
) -> None:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)  # wandb would quietly write to /tmp instead
    run = wandb.init(
        project=config.project,
        name=name,
        group=group,
        tags=list(config.tags),
        dir=str(folder),
        mode=mode,  # type: ignore[arg-type]
        config=results["config"] | {key: results[key] for key in ("command", "versions") if results[key]},
        reinit="create_new",  # a run of the caller's own stays the current one
        settings=wandb.Settings(
            silent=True, console="off", disable_code=True
        ),  # the commit and the machine are wandb's to find
    )
    try:
        _log(run, results)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _log(run: "wandb.Run", results: dict[str, Any]) -> None:
    run.define_metric("slice/bits", hidden=True)
    run.define_metric("slice/*", step_metric="slice/bits", summary="none")
    if allocations(results):
        run.define_metric("allocation/bits", hidden=True)
        run.define_metric("allocation/*", step_metric="allocation/bits", summary="none")
    if (results.get("search") or {}).get("history"):
        run.define_metric("search/generation", hidden=True)
        run.define_metric("search/*", step_metric="search/generation", summary="min")
    run.log(_media(results), step=0)
    names = datasets(results)
    widths = [entry for entry in results["slices"] if entry["bits"] != ALLOCATION]
    for entry in sorted(widths, key=lambda entry: entry["bits"]):
        run.log({"slice/bits": entry["bits"]} | _figures(entry, names, "slice"), step=entry["bits"])
    mixed = [entry for entry in results["slices"] if entry["bits"] == ALLOCATION]
    after = max((entry["bits"] for entry in widths), default=0) + 1  # no points on the widths' line
    for step, entry in enumerate(mixed, after):
        run.log({"allocation/bits": slice_position(entry)} | _figures(entry, names, "allocation"), step=step)
    first = after + len(mixed)
    for step, entry in enumerate((results.get("search") or {}).get("history") or [], first):
        figures = {
            f"search/{key}/{entry['budget']}": entry[key] for key in ("loss", "evaluations", "tokens", "skipped")
        }
        run.log({"search/generation": entry["generation"]} | figures, step=step)
    _log_allocations(run, results)
    run.summary.update(summary(results))


def _log_allocations(run: "wandb.Run", results: dict[str, Any]) -> None:
    """All allocations of a job as one artifact, in the text of the files that ``bits`` accepts."""
    import wandb
    import yaml

    found = allocations(results)
    if not found:
        return
    artifact = wandb.Artifact(f"allocation-{run.id}", type="allocation")
    for entry in found:
        name = Path(str(entry.get("name", "allocation.yaml"))).name
        with artifact.new_file(f"{Path(name).stem}.yaml") as file:
            file.write(yaml.safe_dump({"kind": "allocation", **entry["allocation"]}, sort_keys=False))
    run.log_artifact(artifact)


def _figures(entry: Mapping[str, Any], names: list[str], prefix: str) -> dict[str, float]:
    figures = {f"{prefix}/{m}/{n}": (entry.get(m) or {}).get(n) for m in ("kl", "perplexity") for n in names}
    figures |= {f"{prefix}/tasks/{task}": value for task, value in task_scores(entry).items()}
    figures |= {f"{prefix}/{key}": entry.get(key) for key in ("average_bits", "bytes")}
    return {key: value for key, value in figures.items() if is_number(value)}


def summary(results: Results) -> dict[str, Any]:
    """The figures that a dashboard compares runs by: ``kl/2`` and ``perplexity/2`` are means over the datasets."""
    results = normalized(results)
    figures: dict[str, Any] = {"model": results["model"], "method": results["method"]}
    for entry in results["slices"]:
        for measure in ("kl", "perplexity"):
            values = [value for value in (entry.get(measure) or {}).values() if is_number(value)]
            if values:
                figures[f"{measure}/{entry['bits']}"] = fmean(values)
        figures[f"bytes/{entry['bits']}"] = entry.get("bytes")
    figures |= {f"baseline/perplexity/{name}": v for name, v in results["baseline"].get("perplexity", {}).items()}
    figures |= {f"seconds/{name}": value for name, value in results["seconds"].items()}
    figures |= {f"memory/{name}": (results.get("resources") or {}).get(name) for name in ("host_peak", "device_peak")}
    search = results.get("search") or {}
    figures |= {
        f"search/{name}": search.get(name) for name in ("seconds", "evaluations_per_second", "tokens_per_second")
    }
    models = parents(results)
    figures["parent/bytes"] = sum(m["bytes"] for m in models if is_number(m.get("bytes")))
    figures["parent/reused"] = bool(models) and all(bool(m.get("reused")) for m in models)
    figures["parent/sha256"] = results["parent"].get("sha256")
    return {key: value for key, value in figures.items() if value is not None}


def _media(results: dict[str, Any]) -> dict[str, Any]:
    """Tables, plots and the report, as wandb's types."""
    import wandb
    from PIL import Image

    from matquant.report.allocation_plots import generations_figure, widths_figure
    from matquant.report.drawing import to_png
    from matquant.report.heatmap import layer_figure, layer_widths
    from matquant.report.html import render
    from matquant.report.plots import job_figures

    media: dict[str, Any] = {"slices": _slices_table(results), "report": wandb.Html(render(results), inject=False)}
    if results["layers"]:
        media["layers"] = _layers_table(results)
    drawings = dict(job_figures(results))
    for index, entry in enumerate(allocations(results)[:_MAPS]):
        drawing = widths_figure(entry, results["layers"])
        drawings |= {f"widths_{index}": drawing} if drawing is not None else {}
    drawing = generations_figure(results.get("search") or {})
    drawings |= {"generations": drawing} if drawing is not None else {}
    for bits in layer_widths(results["layers"]):
        drawing = layer_figure(results["layers"], bits)
        drawings |= {f"layer_error_{bits}": drawing} if drawing is not None else {}
    return media | {f"plots/{n}": wandb.Image(Image.open(io.BytesIO(to_png(d)))) for n, d in drawings.items()}


def _slices_table(results: dict[str, Any]) -> "wandb.Table":
    """Bits are texts: wandb wants one type per column, and an allocation has no number."""
    import wandb

    names = datasets(results)
    columns: list[str | int] = ["bits", "average_bits", "bytes"]
    columns += [f"{measure}_{name}" for measure in ("perplexity", "kl") for name in names]
    rows = [
        [str(entry["bits"]), entry.get("average_bits"), entry.get("bytes")]
        + [(entry.get(measure) or {}).get(name) for measure in ("perplexity", "kl") for name in names]
        for entry in [{"bits": "full"} | results["baseline"], *results["slices"]]
    ]
    return wandb.Table(columns=columns, data=rows)


def _layers_table(results: dict[str, Any]) -> "wandb.Table":
    import wandb

    from matquant.report.heatmap import layer_widths

    widths = layer_widths(results["layers"])
    rows = [
        [layer["name"], layer.get("block"), layer.get("parameters")]
        + [(layer.get("error") or {}).get(bits) for bits in widths]
        for layer in results["layers"]
    ]
    return wandb.Table(columns=["name", "block", "parameters", *(f"error_{bits}" for bits in widths)], data=rows)
