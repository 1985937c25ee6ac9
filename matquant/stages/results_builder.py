"""Results of a job from the values of its stages."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matquant.errors import UserError
from matquant.evaluate.metrics import Metrics
from matquant.evaluate.plausibility import kl_warnings, layer_warnings
from matquant.evaluate.slices import FULL
from matquant.evaluate.tasks import Scores, recovery
from matquant.formats.slice_spec import SliceSpec
from matquant.models.unquantized import unquantized_parameters
from matquant.report.provenance import versions
from matquant.report.results import ALLOCATION, BaselineResult, JobResults, LayerErrors, ParentRecord, SliceResult
from matquant.stages.load import LoadedJob
from matquant.stages.runtime import Runtime
from matquant.store import Artifact


@dataclasses.dataclass(kw_only=True, slots=True)
class StageOutputs:
    """Outputs of the stages so far, up to the evaluation.

    Attributes:
        slices: of the parent, of allocation files and of the search.
        refine: record of the refinement; None without one.
        search: record of the search; None without one.
        metrics: of each dataset, by the name of the slice; ``full`` is the full-precision model.
        scores: of the lm-eval tasks, by the name of the slice.
    """

    slices: list[SliceSpec] = dataclasses.field(default_factory=list)
    refine: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    metrics: dict[str, Mapping[str, Metrics]] = dataclasses.field(default_factory=dict)
    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)


def assemble(job: LoadedJob, runtime: Runtime, outputs: StageOutputs, *, command: str, resolved: Any) -> JobResults:
    """Results of all stages up to the evaluation, or up to the one that failed.

    Args:
        command: command line that runs the same job.
        resolved: composed config as plain containers.
    """
    slices, metrics, scores = outputs.slices, outputs.metrics, outputs.scores
    layers = _layer_errors(slices)
    implausible = _implausible(slices, metrics, layers, job.evaluation_dtype)
    return JobResults(
        model=job.model.label,
        method=job.config.method.name,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=json.loads(json.dumps(resolved, default=str)),
        parent=_parent_record(slices),
        baseline=BaselineResult(
            bytes=job.dense_bytes,
            perplexity={name: m[FULL].perplexity for name, m in metrics.items()},
            tasks=scores.get(FULL, {}),
        ),
        slices=[_slice_result(one, metrics, scores) for one in slices],
        refine=outputs.refine,
        search=outputs.search,
        seconds=runtime.log.seconds,
        resources=resources(runtime),
        unquantized=_unquantized(job),
        experts=[
            row for parent in dict.fromkeys(one.parent for one in slices) for row in parent.undersampled_experts()
        ],
        layers=layers,
        warnings=list(dict.fromkeys([*runtime.log.warnings, *implausible])),
        versions=versions(),
    )


def failure_record(stage: str, error: BaseException) -> dict[str, str]:
    """Record of the stage that ended a job: ``stage`` and ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return {"stage": stage, "error": "interrupted"}
    return {"stage": stage, "error": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}


def resources(runtime: Runtime) -> dict[str, Any]:
    """Memory plan, seconds of quantizing by phase, and peak memory so far."""
    log = runtime.log
    return {
        "plan": None if log.plan is None else dataclasses.asdict(log.plan),
        "quantize_seconds": {phase: round(seconds, 3) for phase, seconds in sorted(log.quantize_seconds.items())},
        **runtime.peaks(),
    }


def mean_figure(results: JobResults, metric: str) -> float | None:
    """Mean of one metric over slices and datasets, for a sweeper to minimise; None without a figure."""
    values = [value for one in results.slices for value in getattr(one, metric).values()]
    return sum(values) / len(values) if values else None


def _parent_record(slices: Sequence[SliceSpec]) -> ParentRecord:
    """Record of the parent; with one model per bit-width the sums over the models, and each of them."""
    records = {one.name: _artifact_record(one.parent.artifact) for one in slices}
    distinct = list({record.sha256: record for record in records.values()}.values())
    if len(distinct) == 1:
        return distinct[0]
    hashes = "".join(sorted(str(record.sha256) for record in distinct))
    return ParentRecord(
        path=str(Path(str(distinct[0].path)).parent),
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        bytes=sum(record.bytes or 0 for record in distinct),
        reused=all(record.reused for record in distinct),
        models=records,
    )


def _artifact_record(artifact: Artifact) -> ParentRecord:
    return ParentRecord(path=str(artifact.path), sha256=artifact.sha256, bytes=artifact.bytes, reused=artifact.reused)


def _slice_result(
    one: SliceSpec, metrics: Mapping[str, Mapping[str, Metrics]], scores: Mapping[str, Scores]
) -> SliceResult:
    """Figures of one slice, by dataset and task."""
    found = {name: of_dataset[one.name] for name, of_dataset in metrics.items()}
    facts = None
    if one.allocation is not None:
        facts = {**one.allocation.about, "bits": dict(one.allocation.bits)}
    return SliceResult(
        bits=one.bits if isinstance(one.bits, int) else ALLOCATION,
        name=None if one.allocation is None else one.name,
        allocation=facts,
        average_bits=one.average_bits(),
        bytes=one.bytes_read(),
        perplexity={name: m.perplexity for name, m in found.items()},
        kl={name: m.kl for name, m in found.items()},
        top1_agreement={name: m.top1_agreement for name, m in found.items()},
        tasks=scores.get(one.name, {}),
        recovery=recovery(scores[one.name], scores[FULL]) if one.name in scores else {},
    )


def _implausible(
    slices: Sequence[SliceSpec],
    metrics: Mapping[str, Mapping[str, Metrics]],
    layers: Sequence[LayerErrors],
    dtype: torch.dtype,
) -> list[str]:
    """Sentences on layer errors and KL divergences that a sound parent does not have."""
    sentences = layer_warnings({row.name: row.error for row in layers})
    uniform = {one.bits: one.name for one in slices if isinstance(one.bits, int)}
    for dataset, of_dataset in metrics.items():
        kl = {bits: of_dataset[name].kl for bits, name in uniform.items()}
        sentences += kl_warnings(dataset, kl, dtype)
    return sentences


def _layer_errors(slices: Sequence[SliceSpec]) -> list[LayerErrors]:
    """Errors of each layer; with one model per bit-width, those of all models."""
    rows: dict[str, dict[str, Any]] = {}
    for parent in dict.fromkeys(one.parent for one in slices):
        for row in parent.layer_errors():
            known = rows.setdefault(row["name"], row | {"error": {}})
            known["error"] |= row["error"]
    return [LayerErrors(**row) for row in rows.values()]


def _unquantized(job: LoadedJob) -> list[dict[str, Any]]:
    quantized = set(job.layer_names)
    every = {name for index in range(len(job.blocks)) for name in job.blocks.linears(index)}
    reasons = dict.fromkeys(every - quantized, "skipped by method.skip") | dict(job.fixed_layers)
    return unquantized_parameters(job.blocks, quantized, reasons)
