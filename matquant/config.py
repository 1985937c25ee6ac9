"""The composed YAML becomes frozen dataclasses here, checked once; nothing behind this module sees a DictConfig.

Every wrong value is refused with a sentence before any work starts. Checks that need the model (a group size that does not
divide a layer, a folder without safetensors) are made where the model is first looked at.
"""

import dataclasses
import fnmatch
import math
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from matquant.errors import UserError
from matquant.formats.allocation import is_file_name
from matquant.formats.bits import MAX_BITS, MIN_BITS
from matquant.pack import config as packing
from matquant.pack.config import PackConfig
from matquant.search import config as searching
from matquant.search.config import SearchConfig

GROUP_SIZES = (32, 64, 128, -1)
STAGES = ("quantize", "evaluate", "pack", "generate")

# What batch_size=auto makes of windows: enough to keep a GPU busy, little enough for a block's activations.
_TOKENS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model: a hub ``name``, or a local ``path``."""

    label: str | None  # what results call it; the last part of name or path when null
    name: str | None
    path: str | None
    revision: str | None
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    trust_remote_code: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """A text cut into ``sequences`` windows of ``sequence_length`` tokens."""

    dataset: Literal["stdlib", "wikitext2", "c4", "fineweb_edu", "local", "mix"]
    path: str | None  # of dataset 'local': a file, or a folder of .txt, .md, .py, .jsonl and .parquet files
    sequences: int
    sequence_length: int
    seed: int | None  # draws the windows; null takes the first ones
    batch_size: int  # windows at a time; auto in a config: as many as make 4096 tokens
    field: str | None = None  # of a row of .jsonl and .parquet; null: text, messages or content
    bos: bool | None = None  # windows begin with the tokenizer's first token; null: where it adds one by itself
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of dataset 'mix': a weight for each dataset


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The widths that count, and the weight (lambda) of each one's squared output error."""

    name: str
    weights: Mapping[int, float]
    tilt: float = 1.0  # factor on a weight for each bit above two: beyond 1 high widths gain at the cost of low ones

    @property
    def lambdas(self) -> dict[int, float]:
        """The weight of each width, with the tilt."""
        return {bits: weight * self.tilt ** (bits - 2) for bits, weight in self.weights.items()}

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted(self.weights))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """What some layers have of their own; null: what all have."""

    group_size: int | None = None
    weights: Mapping[int, float] | None = None  # of the objective


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """How codes are chosen. Each field is one trick, so that presets differ by nothing that is hidden."""

    name: str
    solver: Literal["rtn", "gptq"]
    dedicated: bool  # one model per width (a baseline), instead of one parent for all
    slicing: Literal["msb", "round"]
    feedback: Literal["per_width", "mean"]
    master_bits: int
    group_size: int
    symmetric: bool
    offset: float  # of the zero point of symmetric weights, in steps of an 8-bit code; a group may mirror it
    scale: Literal["minmax", "search"]
    act_order: bool
    sweeps: int  # passes of coordinate descent after the solve
    streams: tuple[int, ...]  # widths whose slices are followed through the model while calibrating; none: the parent's
    asymmetric: bool  # aim at the full-precision model's outputs, not those on the quantized model's inputs
    staged: bool  # later layers of a block see the earlier ones quantized
    damp: float
    block_size: int
    skip: tuple[str, ...]  # patterns of layer names that stay as they are
    head: bool  # the output head too; one that is tied to the embeddings becomes a layer of its own

    overrides: Mapping[str, LayerConfig] = dataclasses.field(default_factory=dict)  # by pattern; the first that fits

    def of_layer(self, layer: str) -> LayerConfig:
        """What is different for one layer."""
        fitting = (other for pattern, other in self.overrides.items() if fnmatch.fnmatch(layer, pattern))
        return next(fitting, LayerConfig())

    def skips(self, layer: str) -> bool:
        return any(fnmatch.fnmatch(layer, pattern) for pattern in self.skip)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Texts and tasks that every width is measured on; keys of the texts name them in the results."""

    datasets: Mapping[str, TextConfig]
    tasks: tuple[str, ...]  # of lm-eval
    task_folder: str | None  # of task files
    fewshot: int | None  # null leaves it to the task
    limit: int | None  # questions of each task
    task_batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    wandb: bool
    project: str
    group: str | None
    tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    device: str  # auto, cpu, cuda or cuda:N
    threads: int | None  # of the CPU; null leaves it to torch
    progress: bool | None  # null: when the terminal is one
    check_memory: bool  # refuse a job that cannot fit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    path: str
    action: Literal["ls", "verify", "clean"] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One job. ``bits`` are the widths to measure, ``allocations`` files to measure; neither means the objective's."""

    model: ModelConfig
    calibration: TextConfig
    objective: ObjectiveConfig
    method: MethodConfig
    search: SearchConfig
    eval: EvalConfig
    pack: PackConfig
    tracking: TrackingConfig
    runtime: RuntimeConfig
    store: StoreConfig
    bits: tuple[int, ...]
    allocations: tuple[str, ...]
    stages: tuple[str, ...]
    prompt: str | None  # of the stage generate
    max_new_tokens: int  # likewise
    metric: Literal["kl", "perplexity"]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.bits or (() if self.allocations else self.objective.widths)


def from_hydra(cfg: DictConfig) -> Config:
    """The typed and checked form of a composed config.

    Raises:
        UserError: a key is missing or unknown, a value has the wrong type or is out of range.
    """
    tree = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    bits = tree.get("bits")
    _replace_weights(tree.get("objective"))
    _choose_batches(tree)
    given = [] if bits is None else bits if isinstance(bits, list) else [bits]
    tree["bits"] = [b for b in given if not is_file_name(b)]
    tree["allocations"] = [b for b in given if is_file_name(b)]
    config = typing.cast(Config, _build(Config, tree, ""))
    config = dataclasses.replace(config, search=searching.chosen(config.search))
    _check(config)
    return config


def _replace_weights(objective: Any) -> None:
    """Let a whole mapping, ++objective.weights={2:1,4:4}, replace the preset's instead of adding to it.

    The command line gives it whole numbers as keys, while presets quote theirs so that objective.weights.4=8 finds them.
    """
    if isinstance(objective, dict) and isinstance(objective.get("weights"), dict):
        weights = objective["weights"]
        given = {key: value for key, value in weights.items() if isinstance(key, int)}
        objective["weights"] = given or {int(k) if str(k).isdecimal() else k: v for k, v in weights.items()}


def _choose_batches(tree: dict[str, Any]) -> None:
    """Put a number for ``batch_size: auto``: it follows from the config alone, so that sums and bytes do too."""
    evaluated = (tree.get("eval") or {}).get("datasets")
    for text in (tree.get("calibration"), *(evaluated.values() if isinstance(evaluated, dict) else ())):
        if isinstance(text, dict) and text.get("batch_size") == "auto" and isinstance(text.get("sequence_length"), int):
            text["batch_size"] = max(1, _TOKENS_AT_ONCE // max(1, text["sequence_length"]))


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as type ``kind``; ``where`` is its dotted name, for the sentence when it does not fit."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} must be one of {', '.join(map(str, args))}; found {value!r}.")
        return value
    if origin is tuple:
        values = value if isinstance(value, list | ListConfig) else [value]
        return tuple(_build(args[0], v, where) for v in values)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping; found {value!r}.")
        return {_build(args[0], k, where): _build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _build_scalar(kind, value, where)


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'The config'} must be a group of settings; found {value!r}.")
    hints = get_type_hints(kind)
    optional = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }
    unknown, missing = value.keys() - hints.keys(), hints.keys() - value.keys() - optional
    prefix = f"{where}." if where else ""
    if unknown:
        names = ", ".join(prefix + str(n) for n in sorted(unknown, key=str))
        raise UserError(f"Unknown setting: {names}. There are: {', '.join(prefix + n for n in hints)}.")
    if missing:
        raise UserError(f"Missing setting: {', '.join(prefix + n for n in sorted(missing))}.")
    return kind(**{n: _build(hint, value[n], prefix + n) for n, hint in hints.items() if n in value})


def _build_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UserError(f"{where} must be {names.get(kind, kind.__name__)}; found {value!r}.")
    return value


def _check(config: Config) -> None:
    _check_model(config.model)
    _check_objective(config.objective, config.method.master_bits)
    _check_method(config.method)
    _check_text(config.calibration, "calibration")
    searching.check(config.search, config.method.master_bits, dedicated=config.method.dedicated)
    if not config.eval.datasets:
        raise UserError("eval.datasets names no text; give at least one, for example eval=default.")
    for name, text in config.eval.datasets.items():
        _check_text(text, f"eval.datasets.{name}")
    least = {"task_batch_size": 1, "limit": 1, "fewshot": 0}
    for name, low in least.items():
        if (value := getattr(config.eval, name)) is not None and value < low:
            raise UserError(f"eval.{name} must be at least {low}; found {value}.")
    for bits in config.bits:
        _check_width(bits, "bits", config.method.master_bits)
    if len(set(config.bits)) != len(config.bits):
        raise UserError(f"bits names a width twice: {list(config.bits)}.")
    if config.allocations and config.method.dedicated:
        raise UserError(
            f"bits={config.allocations[0]} mixes widths of one parent, but method={config.method.name} makes a model for "
            "each width. Use method=matgptq, or method.dedicated=false."
        )
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages: there is no stage {stage!r}; there are {', '.join(STAGES)}.")
    models = len(config.widths) if config.method.dedicated else 1
    if "generate" in config.stages and (not config.prompt or config.max_new_tokens < 1 or models > 1):
        raise UserError(
            "stages=[generate] needs a text to go on with, prompt='def ', max_new_tokens of at least 1, and a method that "
            f"makes one parent; found prompt={config.prompt!r}, max_new_tokens={config.max_new_tokens} and {models} models."
        )
    packing.check(config.pack, config.stages, models)


def _check_model(model: ModelConfig) -> None:
    if (model.name is None) == (model.path is None):
        raise UserError(
            "Give either model.name (a name on the hub) or model.path (a local folder), not both or neither."
        )


def _check_width(bits: int, where: str, master_bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"{where}: a width must lie in {MIN_BITS}..{MAX_BITS} bits; found {bits}.")
    if bits > master_bits:
        raise UserError(f"{where}: width {bits} is more than the parent's method.master_bits={master_bits}.")


def _check_objective(objective: ObjectiveConfig, master_bits: int) -> None:
    if not objective.weights:
        raise UserError(
            "objective.weights names no width; give at least one, for example ++objective.weights={2:1,4:4}."
        )
    for bits, weight in objective.weights.items():
        _check_width(bits, "objective.weights", master_bits)
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"objective.weights.{bits} must be a number that is not negative; found {weight}.")
    if not 0.01 <= objective.tilt <= 100:
        raise UserError(f"objective.tilt must lie in 0.01..100, 1 for none; found {objective.tilt}.")
    if not any(objective.weights.values()):
        raise UserError("objective.weights are all zero: nothing would be optimised. Give at least one width a weight.")


def _check_method(method: MethodConfig) -> None:
    if not 4 <= method.master_bits <= MAX_BITS:
        raise UserError(f"method.master_bits must lie in 4..{MAX_BITS}; found {method.master_bits}.")
    if method.group_size not in GROUP_SIZES:
        raise UserError(
            f"method.group_size must be one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per row); "
            f"found {method.group_size}."
        )
    for pattern, layer in method.overrides.items():
        if layer.group_size not in (*GROUP_SIZES, None):
            raise UserError(
                f"method.overrides.{pattern}.group_size must be one of {', '.join(map(str, GROUP_SIZES))}; "
                f"found {layer.group_size}."
            )
        if layer.weights is not None:
            _check_objective(ObjectiveConfig(name=pattern, weights=layer.weights), method.master_bits)
    if not 0 < method.damp < 1:
        raise UserError(
            f"method.damp is a fraction of the Hessian's mean diagonal, above 0 and below 1; found {method.damp}."
        )
    if method.block_size < 1:
        raise UserError(f"method.block_size must be at least 1 column; found {method.block_size}.")
    size = method.group_size
    if size > 0 and size % method.block_size and method.block_size % size:
        raise UserError(
            f"method.block_size={method.block_size} must be a multiple or a divisor of method.group_size={size}, "
            "so that blocks of columns do not cut groups."
        )
    for bits in method.streams:
        _check_width(bits, "method.streams", method.master_bits)
    if method.sweeps < 0:
        raise UserError(f"method.sweeps cannot be negative; found {method.sweeps}.")
    if method.feedback == "mean" and (method.asymmetric or len(method.streams) > 1):
        raise UserError(
            "method.feedback=mean keeps one target for all widths: it needs method.asymmetric=false and at most one of "
            "method.streams."
        )
    if method.offset and method.symmetric and method.slicing != "msb":
        raise UserError("method.offset is for msb slices: the grid of round slices has no mirror image. Set it to 0.")
    if not 0 <= method.offset <= 32:
        raise UserError(f"method.offset must lie in 0..32 steps of an 8-bit code; found {method.offset}.")


def _check_text(text: TextConfig, where: str) -> None:
    for name in ("sequences", "sequence_length", "batch_size"):
        if getattr(text, name) < (2 if name == "sequence_length" else 1):
            raise UserError(f"{where}.{name} is too small: {getattr(text, name)}.")
    if "local" in (text.dataset, *text.mix) and text.path is None:
        raise UserError(f"{where}.dataset={text.dataset} needs {where}.path: a text file or a folder of them.")
    if (text.dataset == "mix") != bool(text.mix):
        raise UserError(
            f"{where}.mix gives each dataset a weight, and goes with {where}.dataset=mix; found {dict(text.mix)}."
        )
    for name, weight in text.mix.items():
        if name not in ("stdlib", "wikitext2", "c4", "fineweb_edu", "local") or not 0 < weight < math.inf:
            raise UserError(
                f"{where}.mix.{name}={weight}: a mix is of stdlib, wikitext2, c4, fineweb_edu and local, with weights above 0."
            )
