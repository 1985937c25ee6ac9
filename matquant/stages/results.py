"""Results of a job, as results.json holds them."""

import contextlib
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matquant import report
from matquant.evaluate.metrics import Metrics
from matquant.evaluate.tasks import Scores, recovery
from matquant.formats.slice_spec import SliceSpec
from matquant.store import Artifact

_VERSIONS = ("matquant", "torch", "transformers", "numpy", "numba", "datasets", "hydra-core")


def describe_parents(variants: Sequence[SliceSpec]) -> dict[str, Any]:
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


def slice_entry(
    variant: SliceSpec, measured: Mapping[str, Mapping[str, Metrics]], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """What was measured of one variant, by dataset and task."""
    found = {name: metrics[variant.name] for name, metrics in measured.items()}
    entry: dict[str, Any] = {"bits": variant.bits if isinstance(variant.bits, int) else report.ALLOCATION}
    if variant.allocation is not None:
        entry["name"] = variant.name
        entry["allocation"] = {**variant.allocation.about, "widths": dict(variant.allocation.widths)}
    return entry | {
        "average_bits": variant.average_bits(),
        "bytes": variant.bytes_read(),
        "perplexity": {name: finite(m.perplexity) for name, m in found.items()},
        "kl": {name: finite(m.kl) for name, m in found.items()},
        "top1_agreement": {name: m.top1_agreement for name, m in found.items()},
        "tasks": scores.get(variant.name, {}),
        "recovery": recovery(scores[variant.name], scores["full"]) if scores else {},
    }


def finite(value: float) -> float | None:
    """JSON has no infinity: what overflowed counts as not measurable."""
    return value if math.isfinite(value) else None


def layer_rows(variants: Sequence[SliceSpec]) -> list[dict[str, Any]]:
    """A row per layer, with the errors of all models that were made for different widths."""
    rows: dict[str, dict[str, Any]] = {}
    for parent in dict.fromkeys(variant.parent for variant in variants):
        for row in parent.layer_errors():
            known = rows.setdefault(row["name"], row | {"error": {}})
            known["error"] |= row["error"]
    return list(rows.values())


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def figure(results: Mapping[str, Any], metric: str) -> float | None:
    """The mean of one metric over slices and datasets, for a sweeper to minimise."""
    values = [value for entry in results["slices"] for value in entry[metric].values()]
    return sum(math.inf if v is None else v for v in values) / len(values) if values else None
