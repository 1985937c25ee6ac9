"""Results of one job as typed values, and ``results.json``: its layout, writing it whole, reading it back."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matquant import number_format
from matquant.errors import UserError
from matquant.number_format import is_number
from matquant.report.output_files import write_atomic

SCHEMA = 1
FILE_NAME = "results.json"
ALLOCATION: Literal["allocation"] = "allocation"
_ABSENT_IF_NONE = ("refine", "pack", "generate", "failure")
_STDERR = "_stderr"  # suffix that lm-eval adds to a metric's name

Figures = Mapping[str, float | None]  # a figure by dataset; None where it could not be measured
Tasks = Mapping[str, Any]  # scores by task: a number, or numbers by metric

_TYPES: dict[str, type] = {"model": str, "method": str, "slices": list}
_OPTIONAL_TYPES: dict[str, type] = {
    "command": str,
    "created": str,
    "config": dict,
    "parent": dict,
    "baseline": dict,
    "seconds": dict,
    "layers": list,
    "warnings": list,
    "failure": dict,
    "versions": dict,
}
_TYPE_NAMES: dict[type, str] = {str: "a text", list: "a list", dict: "a mapping"}


class ResultsError(UserError, ValueError):
    """Results that cannot be written or read; the message names the field and the problem."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParentRecord:
    """Stored parent of the slices.

    Attributes:
        reused: True if the store held it before the job.
        models: with one model per bit-width, the model of each; the other fields are then their sums.
    """

    path: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    reused: bool = False
    models: Mapping[str, "ParentRecord"] = dataclasses.field(default_factory=dict)

    @property
    def stored(self) -> list["ParentRecord"]:
        """Stored models behind the slices: the parent, or with one model per bit-width all of them."""
        known = (self.path, self.sha256, self.bytes) != (None, None, None)
        return list(self.models.values()) or ([self] if known or self.reused else [])

    def of(self, bits: int | str | None) -> "ParentRecord":
        """Stored model that the slice of ``bits`` bits is read from."""
        return self.models.get(str(bits), self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaselineResult:
    """Figures of the full-precision model; ``bytes`` of the quantized layers in its own dtype."""

    bytes: int | None = None
    perplexity: Figures = dataclasses.field(default_factory=dict)
    tasks: Tasks = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SliceResult:
    """Figures of one slice.

    Attributes:
        bits: bit-width; ``allocation`` for a slice with a bit-width per layer.
        name: file of the allocation; None for a uniform slice.
        allocation: facts of the allocation, with the bit-width of each layer under ``bits``; None for a uniform slice.
        average_bits: weighted by parameters.
        bytes: read by a runtime for the quantized layers, scales included.
        kl: KL(full precision || slice) in nats per token, by dataset.
        recovery: share of the full-precision score that is kept, in percent, by task and metric.
    """

    bits: int | Literal["allocation"]
    name: str | None = None
    allocation: Mapping[str, Any] | None = None
    average_bits: float | None = None
    bytes: int | None = None
    perplexity: Figures = dataclasses.field(default_factory=dict)
    kl: Figures = dataclasses.field(default_factory=dict)
    top1_agreement: Figures = dataclasses.field(default_factory=dict)
    tasks: Tasks = dataclasses.field(default_factory=dict)
    recovery: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_allocation(self) -> bool:
        """True for a slice with a bit-width per layer."""
        return self.bits == ALLOCATION

    @property
    def position(self) -> float:
        """Position on an axis of bits: the average bits, or the bit-width."""
        return float(self.average_bits if is_number(self.average_bits) else self.bits)

    @property
    def layer_bits(self) -> Mapping[str, int]:
        """Bit-width of each layer of an allocation; empty for a uniform slice."""
        facts = self.allocation or {}
        return facts.get("bits") or facts.get("widths") or {}

    def figure(self, measure: str, dataset: str) -> float | None:
        """One figure: ``kl`` or ``perplexity`` on a dataset; None if it was not measured."""
        value = getattr(self, measure).get(dataset)
        return value if is_number(value) else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerErrors:
    """Relative output errors of one layer by bit-width."""

    name: str
    block: int | None = None
    parameters: int | None = None
    error: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobResults:
    """Results of one job; ``to_json`` is the content of results.json.

    Attributes:
        refine: record of the refinement: ``method``, ``bits``, ``steps``, and ``history`` of the held-out KL; None without one.
        search: record of the search; None without one.
        seconds: wall time by stage.
        resources: memory plan, peaks, and seconds of quantizing by phase.
        unquantized: parameters that stay as they are: ``name``, ``tensors``, ``parameters``, ``reason``.
        experts: layers of experts with too few calibration tokens: ``name``, ``tokens``, ``inputs``.
        pack, generate: records of these stages; None without them.
        failure: of a job that failed, ``stage`` and ``error``; the other fields are then those of the stages before it.
    """

    model: str
    method: str
    slices: Sequence[SliceResult] = ()
    command: str = ""
    created: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parent: ParentRecord = ParentRecord()
    baseline: BaselineResult = BaselineResult()
    refine: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    resources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unquantized: Sequence[Mapping[str, Any]] = ()
    experts: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[LayerErrors] = ()
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pack: Mapping[str, Any] | None = None
    generate: Mapping[str, Any] | None = None
    failure: Mapping[str, str] | None = None

    @property
    def datasets(self) -> list[str]:
        """Names of the texts that the baseline or a slice was evaluated on, in order of first appearance."""
        names = list(self.baseline.perplexity)
        return list(dict.fromkeys(names + [n for one in self.slices for n in (*one.perplexity, *one.kl)]))

    @property
    def uniform(self) -> list[SliceResult]:
        """Slices with one bit-width, ascending."""
        return sorted((one for one in self.slices if not one.is_allocation), key=lambda one: one.position)

    @property
    def allocations(self) -> list[SliceResult]:
        """Slices with a bit-width per layer."""
        return [one for one in self.slices if one.is_allocation and one.allocation is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain content of results.json."""
        tree = {"schema": SCHEMA, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        tree |= {"parent": _parent_json(self.parent), "baseline": _plain(self.baseline)}
        tree |= {"slices": [_slice_json(one) for one in self.slices], "layers": [_plain(one) for one in self.layers]}
        tree |= {name: list(tree[name]) for name in ("unquantized", "experts", "warnings")}
        return {name: value for name, value in tree.items() if value is not None or name not in _ABSENT_IF_NONE}

    @classmethod
    def from_json(cls, content: Any) -> "JobResults":
        """Typed form of the content of results.json, also of older versions.

        Raises:
            ResultsError: names the first field that is wrong.
        """
        validate(content)
        tree = json.loads(json.dumps(content, default=str))  # keys of mappings become texts
        known = {field.name for field in dataclasses.fields(cls)}
        if "left_alone" in tree:
            tree.setdefault("unquantized", tree["left_alone"])
        fields = {name: value for name, value in tree.items() if name in known and value is not None}
        fields |= {name: tuple(tree.get(name) or ()) for name in ("unquantized", "experts", "warnings")}
        fields |= {
            "parent": _parent(tree.get("parent") or {}),
            "baseline": _from_mapping(BaselineResult, tree.get("baseline") or {}),
            "slices": tuple(_from_mapping(SliceResult, one) for one in tree["slices"]),
            "layers": tuple(_from_mapping(LayerErrors, one) for one in tree.get("layers") or ()),
        }
        return cls(**fields)


def write(results: JobResults, folder: Path) -> Path:
    """Write ``folder/results.json``, whole or not at all, and return its path.

    Raises:
        ResultsError: a field has the wrong type, or holds a NaN or an infinity.
    """
    content = results.to_json()
    validate(content)
    for field, value in _leaves(content, ""):
        _check_leaf(field, value)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomic(Path(folder) / FILE_NAME, text + "\n")


def load(path: Path) -> JobResults:
    """Read the results in a job's folder, or in the file itself.

    Raises:
        ResultsError: there is no such file, or it is not a results file of this schema.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"There is no {file}; a job writes it when it ends.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{file} cannot be read as JSON: {error}.") from error
    try:
        return JobResults.from_json(content)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None


def validate(content: Any) -> None:
    """Check the content of results.json. Optional fields are checked where they are present.

    Raises:
        ResultsError: names the first field that is wrong.
    """
    if not isinstance(content, Mapping):
        raise ResultsError(f"Results must be a mapping; found {type(content).__name__}.")
    if content.get("schema") != SCHEMA:
        raise ResultsError(f"schema must be {SCHEMA}, which this version reads; found {content.get('schema')!r}.")
    for field, kind in (_TYPES | _OPTIONAL_TYPES).items():
        if field in _OPTIONAL_TYPES and field not in content:
            continue
        accepted: Any = Mapping if kind is dict else (list, tuple) if kind is list else kind
        if not isinstance(content.get(field), accepted):
            raise ResultsError(f"{field} must be {_TYPE_NAMES[kind]}; found {content.get(field)!r}.")
    for index, entry in enumerate(content["slices"]):
        _check_slice(entry, f"slices[{index}]")
    for index, layer in enumerate(content.get("layers", [])):
        if not isinstance(layer, Mapping) or not isinstance(layer.get("name"), str):
            raise ResultsError(f"layers[{index}] must be a mapping with a name; found {layer!r}.")
    _check_figures(content.get("baseline", {}), "baseline")
    _check_numbers(content.get("seconds", {}), "seconds")


def failure_sentence(failure: Mapping[str, str]) -> str:
    """Sentence on the stage that failed."""
    return f"Stage {failure.get('stage')} failed: {failure.get('error')}"


def task_scores(tasks: Tasks) -> dict[str, float]:
    """Scores by ``TASK`` or ``TASK/METRIC``, without standard errors; `task_errors` has those under the same names."""
    return {name: v for name, v in _task_figures(tasks).items() if not name.endswith(_STDERR)}


def task_errors(tasks: Tasks) -> dict[str, float]:
    """Standard errors of the `task_scores` that have one."""
    return {name.removesuffix(_STDERR): v for name, v in _task_figures(tasks).items() if name.endswith(_STDERR)}


def cost_sentence(quantize_seconds: float | None, models: Sequence[ParentRecord]) -> str:
    """Sentence on the time of quantizing and the size of the stored models, see ``ParentRecord.stored``."""
    total = sum(model.bytes for model in models if model.bytes is not None)
    reused = sum(model.reused for model in models)
    made = (
        f"Quantized in {number_format.seconds(quantize_seconds)}"
        if number_format.is_number(quantize_seconds)
        else "Quantized"
    )
    if len(models) <= 1:
        made = "Parent reused from the store" if reused else made
        return f"{made}; the parent takes {number_format.size(total)}." if total else f"{made}."
    if reused == len(models):
        made = "All models reused from the store"
    elif reused:
        made += f" ({reused} of {len(models)} models reused)"
    return f"{made}; {len(models)} models, one per bit-width, take {number_format.size(total)} together."


def refine_sentence(refine: Mapping[str, Any] | None) -> str:
    """Sentence on a refinement; empty without one."""
    if refine is None:
        return ""
    bits = ", ".join(map(str, refine.get("bits", ())))
    if refine.get("method") == "qat":
        return f" Weights trained at {bits} bits in {refine.get('steps')} steps."
    return f" Scales of {bits} bits refined in {refine.get('steps')} steps."


def _task_figures(tasks: Tasks) -> dict[str, float]:
    scores: dict[str, float] = {}
    for task, value in (tasks or {}).items():
        named = {f"{task}/{metric}": v for metric, v in value.items()} if isinstance(value, Mapping) else {task: value}
        scores |= {name: v for name, v in named.items() if is_number(v)}
    return scores


def _plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _slice_json(one: SliceResult) -> dict[str, Any]:
    return {k: v for k, v in _plain(one).items() if v is not None or k not in ("name", "allocation")}


def _parent_json(parent: ParentRecord) -> dict[str, Any]:
    tree = {name: value for name, value in _plain(parent).items() if name != "models"}
    return tree | ({"models": {k: _parent_json(v) for k, v in parent.models.items()}} if parent.models else {})


def _parent(tree: Mapping[str, Any]) -> ParentRecord:
    models = {str(bits): _parent(model) for bits, model in (tree.get("models") or {}).items()}
    parent: ParentRecord = _from_mapping(ParentRecord, {**tree, "models": {}})
    return dataclasses.replace(parent, models=models)


def _from_mapping(kind: Any, tree: Mapping[str, Any]) -> Any:
    """Dataclass from a mapping; null and unknown entries are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in tree.items() if name in known and value is not None})


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
