"""Jobs of a sweep, read from its folder, whichever launcher ran them: rows of a table, and curves of a plot."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from matquant.report.results import (
    FILE_NAME,
    BaselineResult,
    JobResults,
    ResultsError,
    SliceResult,
    failure_sentence,
    load,
)

ERROR_FILE = "error.txt"  # error of a failed job, see SummaryCallback
DONE, FAILED = "done", "failed"
_HYDRA = ".hydra"
# Groups that do not change a slice's figures, or that are the x axis of a curve.
_NOT_IN_CURVE = ("bits", "tracking", "runtime", "store", "stages", "metric", "pack")
_SELF_EXPLANATORY = ("method", "model", "objective.name")  # values that need no key beside them

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SweepJob:
    """One job of a sweep; a failed one has an ``error`` sentence, and ``results`` of the stages before the failed one."""

    name: str  # folder relative to that of the sweep
    folder: Path
    overrides: tuple[str, ...]
    config: Mapping[str, Any]
    results: JobResults | None
    error: str | None

    @property
    def status(self) -> str:
        """``done`` or ``failed``."""
        return DONE if self.error is None else FAILED

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.results.method if self.results else _nested(self.config, "method", "name") or "")

    @property
    def model(self) -> str:
        """Label of the model."""
        if self.results:
            return self.results.model
        given = [_nested(self.config, "model", key) for key in ("label", "name", "path")]
        return next((str(g).rstrip("/").rpartition("/")[2] for g in given if g), "")


@dataclass(frozen=True, slots=True)
class Curve:
    """Slices of jobs that differ by nothing but their bit-widths."""

    name: str
    slices: tuple[SliceResult, ...]
    baseline: BaselineResult


def read_jobs(folder: Path, since: float | None = None) -> list[SweepJob]:
    """Read every job below ``folder``, failed ones too, in their natural order (2 before 10).

    Args:
        since: start of the sweep in seconds since the epoch; older results of a job that was started again are ignored.
    """
    folders = sorted(_job_folders(Path(folder)), key=lambda path: _natural(path.relative_to(folder).as_posix()))
    return [_read_job(path, path.relative_to(folder).as_posix(), since) for path in folders]


def rows(jobs: Sequence[SweepJob]) -> list[Row]:
    """Table rows, one per job and slice, all with the same keys; a job without slices has one row without ``bits``."""
    names = dataset_names(jobs)
    return [row for job in jobs for row in _job_rows(job, names)]


def curves(jobs: Sequence[SweepJob]) -> list[Curve]:
    """Curves over the finished jobs; jobs that differ only in bit-widths share one. Names hold what distinguishes them."""
    groups: dict[str, list[SweepJob]] = {}
    traits: dict[str, dict[str, str]] = {}
    for job in jobs:
        if job.results is not None and job.results.slices:
            trait = _traits(job)
            key = repr(sorted(trait.items()))
            groups.setdefault(key, []).append(job)
            traits[key] = trait
    names = _distinguishing_names(list(traits.values()))
    return [_curve(name, group) for name, group in zip(names, groups.values(), strict=True)]


def dataset_names(jobs: Sequence[SweepJob]) -> list[str]:
    """Names of all texts that a job was evaluated on."""
    return list(dict.fromkeys(name for job in jobs if job.results for name in job.results.datasets))


def varying_overrides(jobs: Sequence[SweepJob]) -> list[tuple[str, ...]]:
    """Overrides of each job without those that all jobs share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [tuple(o for o in job.overrides if o not in shared) for job in jobs]


def _job_folders(root: Path) -> Iterator[Path]:
    """Yield folders with Hydra's record of a job or with results, but no folders inside of those."""
    for path, folders, files in os.walk(root):
        if _HYDRA in folders or FILE_NAME in files:
            yield Path(path)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def _read_job(folder: Path, name: str, since: float | None) -> SweepJob:
    overrides = _read_yaml(folder / _HYDRA / "overrides.yaml")
    given = tuple(str(o) for o in overrides) if isinstance(overrides, list) else ()
    results, error = _read_results(folder, since)
    config = dict(results.config) if results else _read_yaml(folder / _HYDRA / "config.yaml")
    return SweepJob(name, folder, given, config if isinstance(config, dict) else {}, results, error)


def _read_results(folder: Path, since: float | None) -> tuple[JobResults | None, str | None]:
    """Results and error of a job. A failed job has results if a stage finished before the failure."""
    error = _own_error(folder)
    try:
        results = load(folder)
    except ResultsError as problem:
        missing = "It left no results: killed, interrupted or still running."
        return None, error or (str(problem) if (folder / FILE_NAME).exists() else missing)
    if since is not None and _is_stale(folder, since):
        return None, error or "It was started but left no results."
    if results.failure is not None:
        return results, error or failure_sentence(results.failure)
    return (results, None) if error is None else (None, error)  # with an error they are those of an earlier attempt


def _own_error(folder: Path) -> str | None:
    try:
        return (folder / ERROR_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _is_stale(folder: Path, since: float) -> bool:
    try:
        started = (folder / _HYDRA / "overrides.yaml").stat().st_mtime
        written = (folder / FILE_NAME).stat().st_mtime
    except OSError:
        return False
    return written < since <= started


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _job_rows(job: SweepJob, names: Sequence[str]) -> list[Row]:
    slices: Sequence[SliceResult | None] = (job.results.slices if job.results else ()) or [None]
    return [_row(job, one, names) for one in slices]


def _row(job: SweepJob, one: SliceResult | None, names: Sequence[str]) -> Row:
    parent = job.results.parent.of(one.bits if one else None) if job.results else None
    row: Row = {"job": job.name, "overrides": " ".join(job.overrides), "model": job.model, "method": job.method}
    row |= {"status": job.status} | {key: getattr(one, key, None) for key in ("bits", "average_bits", "bytes")}
    row |= {f"{m}_{name}": getattr(one, m).get(name) if one else None for m in ("perplexity", "kl") for name in names}
    row |= {"seconds_quantize": job.results.seconds.get("quantize") if job.results else None}
    row |= {"reused": parent.reused if parent else None, "parent_sha256": parent.sha256 if parent else None}
    return row | {"error": job.error}


def _traits(job: SweepJob) -> dict[str, str]:
    """Settings of a curve by dotted key, without bits, outputs and runtime."""
    config = {key: value for key, value in job.config.items() if key not in _NOT_IN_CURVE}
    leaves = {".".join(key): str(value) for key, value in _leaves(config)}
    leaves.pop("method.name", None)
    return {"method": job.method, "model": job.model, "objective.name": leaves.pop("objective.name", "")} | leaves


def _distinguishing_names(traits: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of curves: the method, the model if there are several, and the settings that distinguish a method's curves."""
    heads = ["method", "model"] if len({trait["model"] for trait in traits}) > 1 else ["method"]
    names = []
    for trait in traits:
        rivals = [other for other in traits if all(other[key] == trait[key] for key in heads)]
        names.append(", ".join(_words(key, trait) for key in [*heads, *_splitting_keys(rivals)] if trait.get(key)))
    return names


def _splitting_keys(traits: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that each distinguish some of ``traits`` that the keys before it do not; self-explanatory keys first."""
    chosen: list[str] = []
    for key in dict.fromkeys(key for trait in traits for key in trait):
        if len(_classes(traits, [*chosen, key])) > len(_classes(traits, chosen)):
            chosen.append(key)
    return chosen


def _words(key: str, trait: Mapping[str, str]) -> str:
    return trait[key] if key in _SELF_EXPLANATORY else f"{key}={trait[key]}"


def _classes(traits: Sequence[Mapping[str, str]], keys: Sequence[str]) -> set[tuple[str | None, ...]]:
    return {tuple(trait.get(key) for key in keys) for trait in traits}


def _curve(name: str, jobs: Sequence[SweepJob]) -> Curve:
    slices: dict[str, SliceResult] = {}
    baseline = BaselineResult()
    for results in (job.results for job in jobs if job.results is not None):
        merged = {**baseline.perplexity, **results.baseline.perplexity}
        baseline = replace(results.baseline, perplexity=merged)
        for one in results.slices:
            key = _slice_key(one)
            slices[key] = _merge(slices[key], one) if key in slices else one
    return Curve(name, tuple(slices.values()), baseline)


def _slice_key(one: SliceResult) -> str:
    """Bit-width; of an allocation its average."""
    return f"{one.bits} {one.average_bits}" if one.is_allocation else str(one.bits)


def _merge(old: SliceResult, new: SliceResult) -> SliceResult:
    """Newer slice with the figures of the datasets of both."""
    return replace(new, perplexity={**old.perplexity, **new.perplexity}, kl={**old.kl, **new.kl})


def _leaves(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, (*key, str(name)))
    else:
        yield key, value


def _nested(config: Mapping[str, Any], group: str, key: str) -> Any:
    inner = config.get(group)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
