"""A sweep's jobs as they lie in its folder, whichever launcher ran them: rows of a table, and lines of a plot."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from matquant.report.results import FILE_NAME, ResultsError, datasets, load, normalized, parent_of

ERROR_FILE = "error.txt"  # a job's own last words, see SummaryCallback
DONE, FAILED = "done", "failed"
_HYDRA = ".hydra"
# What cannot change a slice's figures, or is what a line runs over.
_NO_PART_OF_LINE = ("bits", "tracking", "runtime", "store", "stages", "metric", "pack")
_SPEAKING = ("method", "model", "objective.name")  # their values say what they are

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One job. Of a failed one there is an ``error`` sentence instead of ``results``."""

    name: str  # its folder, relative to the sweep's
    folder: Path
    overrides: tuple[str, ...]
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None
    error: str | None

    @property
    def status(self) -> str:
        return DONE if self.results is not None else FAILED

    @property
    def method(self) -> str:
        return str(self.results["method"] if self.results else _nested(self.config, "method", "name") or "")

    @property
    def model(self) -> str:
        if self.results:
            return str(self.results["model"])
        given = [_nested(self.config, "model", key) for key in ("label", "name", "path")]
        return next((str(g).rstrip("/").rpartition("/")[2] for g in given if g), "")


@dataclass(frozen=True, slots=True)
class Line:
    """Jobs that differ by nothing but their widths: their slices belong together."""

    name: str
    slices: tuple[Mapping[str, Any], ...]
    baseline: Mapping[str, Any]


def read_jobs(folder: Path, since: float | None = None) -> list[Job]:
    """Every job below ``folder``, failed ones too, in their natural order (2 before 10).

    ``since`` (seconds since the epoch) is when the sweep started: results older than that, of a job that was started
    again since, are left from before and do not count.
    """
    folders = sorted(_job_folders(Path(folder)), key=lambda path: _natural(path.relative_to(folder).as_posix()))
    return [_read_job(path, path.relative_to(folder).as_posix(), since) for path in folders]


def rows(jobs: Sequence[Job]) -> list[Row]:
    """One row per job and slice, with the same keys throughout; a job without slices has one row without ``bits``."""
    names = dataset_names(jobs)
    return [row for job in jobs for row in _job_rows(job, names)]


def lines(jobs: Sequence[Job]) -> list[Line]:
    """The finished jobs' slices, joined where only the widths differ, and named by what tells the lines apart."""
    groups: dict[str, list[Job]] = {}
    traits: dict[str, dict[str, str]] = {}
    for job in jobs:
        if job.results is not None and job.results["slices"]:
            trait = _traits(job)
            key = repr(sorted(trait.items()))
            groups.setdefault(key, []).append(job)
            traits[key] = trait
    names = _distinguishing_names(list(traits.values()))
    return [_line(name, group) for name, group in zip(names, groups.values(), strict=True)]


def dataset_names(jobs: Sequence[Job]) -> list[str]:
    """All texts that any job was measured on."""
    return list(dict.fromkeys(name for job in jobs if job.results for name in datasets(job.results)))


def varying_overrides(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """Each job's overrides without those that all jobs share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [tuple(o for o in job.overrides if o not in shared) for job in jobs]


def _job_folders(root: Path) -> Iterator[Path]:
    """Folders with Hydra's record of a job, or with results; not the folders inside of those."""
    for path, folders, files in os.walk(root):
        if _HYDRA in folders or FILE_NAME in files:
            yield Path(path)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def _read_job(folder: Path, name: str, since: float | None) -> Job:
    overrides = _read_yaml(folder / _HYDRA / "overrides.yaml")
    given = tuple(str(o) for o in overrides) if isinstance(overrides, list) else ()
    results, error = None, _own_error(folder)
    try:
        if error is None and since is not None and _is_stale(folder, since):
            error = "It was started but left no results."
        results = normalized(load(folder)) if error is None else None
    except ResultsError as problem:
        error = (
            str(problem)
            if (folder / FILE_NAME).exists()
            else "It left no results: killed, interrupted or still running."
        )
    config = results["config"] if results else _read_yaml(folder / _HYDRA / "config.yaml")
    return Job(name, folder, given, config if isinstance(config, dict) else {}, results, error)


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


def _job_rows(job: Job, names: Sequence[str]) -> list[Row]:
    entries = (job.results or {}).get("slices") or [{}]
    return [_row(job, entry, names) for entry in entries]


def _row(job: Job, entry: Mapping[str, Any], names: Sequence[str]) -> Row:
    results: Mapping[str, Any] = job.results or {}
    parent = parent_of(results, entry.get("bits"))
    row: Row = {"job": job.name, "overrides": " ".join(job.overrides), "model": job.model, "method": job.method}
    row |= {"status": job.status} | {key: entry.get(key) for key in ("bits", "average_bits", "bytes")}
    row |= {f"{m}_{name}": (entry.get(m) or {}).get(name) for m in ("perplexity", "kl") for name in names}
    row |= {"seconds_quantize": results.get("seconds", {}).get("quantize")}
    return row | {"reused": parent.get("reused"), "parent_sha256": parent.get("sha256"), "error": job.error}


def _traits(job: Job) -> dict[str, str]:
    """What a line stands for: dotted config key -> value, without what only says which widths, where and how."""
    config = {key: value for key, value in job.config.items() if key not in _NO_PART_OF_LINE}
    leaves = {".".join(key): str(value) for key, value in _leaves(config)}
    leaves.pop("method.name", None)
    return {"method": job.method, "model": job.model, "objective.name": leaves.pop("objective.name", "")} | leaves


def _distinguishing_names(traits: Sequence[Mapping[str, str]]) -> list[str]:
    """The method, the model if there are several, and then no more than it takes to tell a method's lines apart."""
    heads = ["method", "model"] if len({trait["model"] for trait in traits}) > 1 else ["method"]
    names = []
    for trait in traits:
        rivals = [other for other in traits if all(other[key] == trait[key] for key in heads)]
        names.append(", ".join(_words(key, trait) for key in [*heads, *_splitting_keys(rivals)] if trait.get(key)))
    return names


def _splitting_keys(traits: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys, the speaking ones first, each of which tells some of ``traits`` apart that those before it do not."""
    chosen: list[str] = []
    for key in dict.fromkeys(key for trait in traits for key in trait):
        if len(_classes(traits, [*chosen, key])) > len(_classes(traits, chosen)):
            chosen.append(key)
    return chosen


def _words(key: str, trait: Mapping[str, str]) -> str:
    return trait[key] if key in _SPEAKING else f"{key}={trait[key]}"


def _classes(traits: Sequence[Mapping[str, str]], keys: Sequence[str]) -> set[tuple[str | None, ...]]:
    return {tuple(trait.get(key) for key in keys) for trait in traits}


def _line(name: str, jobs: Sequence[Job]) -> Line:
    found = [job.results for job in jobs if job.results is not None]
    slices: dict[str, Mapping[str, Any]] = {}
    baseline: Mapping[str, Any] = {}
    for results in found:
        baseline = _merged(baseline, results["baseline"])
        for entry in results["slices"]:
            slices[_slice_key(entry)] = _merged(slices.get(_slice_key(entry), {}), entry)
    return Line(name, tuple(slices.values()), baseline)


def _slice_key(entry: Mapping[str, Any]) -> str:
    """A width; allocations are told apart by their size."""
    return str(entry["bits"]) if isinstance(entry["bits"], int) else f"{entry['bits']} {entry.get('average_bits')}"


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, and both measured on the datasets of either."""
    figures = {measure: {**(old.get(measure) or {}), **(new.get(measure) or {})} for measure in ("perplexity", "kl")}
    return {**old, **new, **figures}


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
