"""``results.json``, the record of one job: its schema, writing it whole, reading it back."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from matquant.errors import UserError
from matquant.report.output_files import write_atomic

SCHEMA = 1
FILE_NAME = "results.json"
ALLOCATION = "allocation"
_ERROR = "_stderr"  # what lm-eval adds to a metric's name

Results = Mapping[str, Any]

_EMPTY: dict[str, Any] = {
    "command": "",
    "created": "",
    "config": {},
    "parent": {},
    "baseline": {},
    "seconds": {},
    "layers": [],
    "warnings": [],
    "versions": {},
}
_KINDS: dict[str, type] = {"model": str, "method": str, "slices": list} | {k: type(v) for k, v in _EMPTY.items()}
_WORDS: dict[type, str] = {str: "a text", list: "a list", dict: "a mapping"}


class ResultsError(UserError, ValueError):
    """The results cannot be written or read; the message says which field is wrong and how."""


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/results.json``, whole or not at all, and return its path.

    Raises:
        ResultsError: a field is missing, has the wrong type, or holds a NaN or an infinity.
    """
    validate(results)
    for field, value in _leaves(results, ""):
        _check_leaf(field, value)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomic(Path(folder) / FILE_NAME, text + "\n")


def load(path: Path) -> dict[str, Any]:
    """The results in a job's folder, or in the file itself.

    Raises:
        ResultsError: there is no such file, or it is not a results file of this schema.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"There is no {file}; a job writes it when it ends.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{file} cannot be read as JSON: {error}.") from error
    try:
        validate(results)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None
    return results


def validate(results: Any) -> None:
    """Refuse what the report could not show. Optional fields are checked where they are present.

    Raises:
        ResultsError: names the first field that is wrong.
    """
    if not isinstance(results, Mapping):
        raise ResultsError(f"Results must be a mapping; found {type(results).__name__}.")
    if results.get("schema") != SCHEMA:
        raise ResultsError(f"schema must be {SCHEMA}, which this version reads; found {results.get('schema')!r}.")
    for field, kind in _KINDS.items():
        if field not in results and field in _EMPTY:
            continue
        if not isinstance(results.get(field), Mapping if kind is dict else kind):
            raise ResultsError(f"{field} must be {_WORDS[kind]}; found {results.get(field)!r}.")
    for index, entry in enumerate(results["slices"]):
        _check_slice(entry, f"slices[{index}]")
    for index, layer in enumerate(results.get("layers", [])):
        if not isinstance(layer, Mapping) or not isinstance(layer.get("name"), str):
            raise ResultsError(f"layers[{index}] must be a mapping with a name; found {layer!r}.")
    _check_figures(results.get("baseline", {}), "baseline")
    _check_numbers(results.get("seconds", {}), "seconds")


def normalized(results: Results) -> dict[str, Any]:
    """A validated copy as it reads back from JSON (every key a text), with empty values for what is absent."""
    validate(results)
    return _EMPTY | json.loads(json.dumps(results, default=str))


def datasets(results: Results) -> list[str]:
    """Names of the texts that the baseline or a slice was measured on, in order of first appearance."""
    entries = [results.get("baseline", {}), *results["slices"]]
    return list(dict.fromkeys(name for entry in entries for key in ("perplexity", "kl") for name in entry.get(key, {})))


def task_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """``{"arc_easy": 0.7}``, from that or from ``{"arc_easy": {"acc": 0.7}}`` (then named ``arc_easy/acc``).

    Standard errors are left out; `task_errors` has them under the same names.
    """
    return {name: v for name, v in _task_figures(entry).items() if not name.endswith(_ERROR)}


def task_errors(entry: Mapping[str, Any]) -> dict[str, float]:
    """The standard errors of `task_scores`, of those that have one."""
    return {name.removesuffix(_ERROR): v for name, v in _task_figures(entry).items() if name.endswith(_ERROR)}


def _task_figures(entry: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for task, value in (entry.get("tasks") or {}).items():
        named = {f"{task}/{metric}": v for metric, v in value.items()} if isinstance(value, Mapping) else {task: value}
        scores |= {name: v for name, v in named.items() if is_number(v)}
    return scores


def parents(results: Results) -> list[Mapping[str, Any]]:
    """The stored models behind the slices: the one parent, or of a dedicated method one per width."""
    parent = results.get("parent", {})
    models = parent.get("models") or {}
    return list(models.values()) or ([parent] if parent else [])


def parent_of(results: Results, bits: Any) -> Mapping[str, Any]:
    """The stored model that the slice of ``bits`` is read from."""
    parent = results.get("parent", {})
    models: Mapping[str, Any] = parent.get("models") or {}
    return models.get(str(bits), parent)


def slice_position(entry: Mapping[str, Any]) -> float:
    """Where a slice stands on an axis of bits: its average bits, or its width."""
    average = entry.get("average_bits")
    return float(average if is_number(average) else entry["bits"])


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_slice(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise ResultsError(f"{where} must be a mapping; found {entry!r}.")
    bits = entry.get("bits")
    if bits != ALLOCATION and (not isinstance(bits, int) or isinstance(bits, bool)):
        raise ResultsError(f"{where}.bits must be a whole number or {ALLOCATION!r}; found {bits!r}.")
    if bits == ALLOCATION and not isinstance(entry.get("average_bits"), int | float):
        raise ResultsError(f"{where}.average_bits must be a number; found {entry.get('average_bits')!r}.")
    _check_figures(entry, where)


def _check_figures(entry: Mapping[str, Any], where: str) -> None:
    scalars = {key: entry[key] for key in ("average_bits", "bytes") if key in entry}
    _check_numbers(scalars, where)
    for key in ("perplexity", "kl"):
        if not isinstance(entry.get(key, {}), Mapping):
            raise ResultsError(f"{where}.{key} must map a dataset to a number; found {entry[key]!r}.")
        _check_numbers(entry.get(key, {}), f"{where}.{key}")
    if not isinstance(entry.get("tasks") or {}, Mapping):
        raise ResultsError(f"{where}.tasks must map a task to its score; found {entry['tasks']!r}.")


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ResultsError(f"{where}.{key} must be a number, or null where nothing was measured; found {value!r}.")


def _leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """Every scalar with its dotted name, such as ``slices[0].kl.stdlib``."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{field}[{index}]")
    else:
        yield field, value


def _check_leaf(field: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(f"{field} is {value}, which JSON cannot hold. Give null for a figure that was not measured.")
    if value is not None and not isinstance(value, str | int | float):
        raise ResultsError(f"{field} is a {type(value).__name__}, which JSON cannot hold; give a text or a number.")
