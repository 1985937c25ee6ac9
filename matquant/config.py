"""Typed config of a job: the composed YAML becomes frozen dataclasses. No other module reads a DictConfig."""

import dataclasses
import typing
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from matquant.data.config import TextConfig
from matquant.evaluate.config import EvalConfig
from matquant.formats.allocation import is_file_name
from matquant.models.config import ModelConfig
from matquant.pack import config as packing
from matquant.pack.config import PackConfig
from matquant.quantize.config import MethodConfig, ObjectiveConfig
from matquant.quantize.gptq.config import GptqConfig
from matquant.quantize.omniquant.config import OmniQuantConfig
from matquant.quantize.rtn.config import RtnConfig
from matquant.refine.config import RefineConfig
from matquant.report.config import TrackingConfig
from matquant.search import config as searching
from matquant.search.config import SearchConfig, with_default_method
from matquant.store.config import StoreConfig
from matquant.transforms.config import TransformConfig
from matquant.typed_config import TARGET, build, defaults_of

METHODS: dict[str, type[MethodConfig]] = {"gptq": GptqConfig, "omniquant": OmniQuantConfig, "rtn": RtnConfig}

STAGES = ("quantize", "evaluate", "pack", "generate")

_TOKENS_AT_ONCE = 4096  # tokens of one forward pass with batch_size=auto: they keep a GPU busy and need little memory

# Settings that had another name before.
RENAMED = (
    {
        "method.solver": "method._target_",
        "method.dedicated": "method.per_bit_models",
        "method.feedback": "method.error_feedback",
        "method.offset": "method.zero_point_offset",
        "method.sweeps": "method.cd_passes",
        "method.streams": "method.calibration_bits",
        "method.asymmetric": "method.asymmetric_calibration",
        "method.staged": "method.true_sequential",
        "method.head": "method.quantize_lm_head",
        "objective.tilt": "objective.per_bit_factor",
    }
    | searching.RENAMED
    | packing.RENAMED
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Device, threads and terminal of a job.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        threads: of the CPU; null leaves it to torch.
        progress: progress bars; null: if the terminal is one.
        check_memory: refuse a job that cannot fit.
    """

    device: str = "auto"
    threads: int | None = None
    progress: bool | None = None
    check_memory: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One job.

    Attributes:
        bits: bit-widths to evaluate; none, without ``allocations``, means those of the objective.
        allocations: allocation files to evaluate.
        stages: of the job, see ``STAGES``.
        prompt, max_new_tokens: of the stage generate.
        metric: figure that a sweeper minimises.
    """

    model: ModelConfig
    calibration: TextConfig
    objective: ObjectiveConfig
    method: MethodConfig
    transform: TransformConfig
    refine: RefineConfig
    search: SearchConfig
    eval: EvalConfig
    pack: PackConfig
    tracking: TrackingConfig
    runtime: RuntimeConfig
    store: StoreConfig
    bits: tuple[int, ...] = ()
    allocations: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("quantize", "evaluate")
    prompt: str | None = None
    max_new_tokens: int = 48
    metric: Literal["kl", "perplexity"] = "kl"

    @property
    def slice_bits(self) -> tuple[int, ...]:
        """Bit-widths of the uniform slices that the job makes."""
        return self.bits or (() if self.allocations else self.objective.bits)


def schemas() -> dict[str, dict[str, Any]]:
    """Defaults of every component's settings, as nodes of the Hydra group ``schema``."""
    nodes = {
        "model": ModelConfig,
        "text": TextConfig,
        "eval": EvalConfig,
        "store": StoreConfig,
        "objective": ObjectiveConfig,
        "refine": RefineConfig,
        "search": SearchConfig,
        "pack": PackConfig,
        "tracking": TrackingConfig,
        "runtime": RuntimeConfig,
        "transform": TransformConfig,
    }
    found = {name: defaults_of(kind) for name, kind in nodes.items()}
    for name, kind in METHODS.items():
        found[name] = {TARGET: f"{kind.__module__}.{kind.__qualname__}", **defaults_of(kind)}
    return found


def from_hydra(cfg: DictConfig) -> Config:
    """Typed form of a composed config.

    Raises:
        UserError: a key is missing or unknown, or a value has the wrong type.
    """
    tree = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    bits = tree.get("bits")
    _replace_weights(tree.get("objective"))
    _choose_batch_sizes(tree)
    given = [] if bits is None else bits if isinstance(bits, list) else [bits]
    tree["bits"] = [b for b in given if not is_file_name(b)]
    tree["allocations"] = [b for b in given if is_file_name(b)]
    config = typing.cast(Config, build(Config, tree, renamed=RENAMED))
    return dataclasses.replace(config, search=with_default_method(config.search))


def _replace_weights(objective: Any) -> None:
    """Let a whole mapping, ++objective.weights={2:1,4:4}, replace the preset's weights instead of merging with them.

    The command line gives it whole numbers as keys, while presets quote theirs, so that objective.weights.4=8 finds them.
    """
    if isinstance(objective, dict) and isinstance(objective.get("weights"), dict):
        weights = objective["weights"]
        given = {key: value for key, value in weights.items() if isinstance(key, int)}
        objective["weights"] = given or {int(k) if str(k).isdecimal() else k: v for k, v in weights.items()}


def _choose_batch_sizes(tree: dict[str, Any]) -> None:
    """Replace ``batch_size: auto`` by a number that follows from the config alone, so that the parent's bytes do too."""
    evaluated = (tree.get("eval") or {}).get("datasets")
    refined = (tree.get("refine") or {}).get("text")
    for text in (tree.get("calibration"), refined, *(evaluated.values() if isinstance(evaluated, dict) else ())):
        if isinstance(text, dict) and text.get("batch_size") == "auto" and isinstance(text.get("sequence_length"), int):
            text["batch_size"] = max(1, _TOKENS_AT_ONCE // max(1, text["sequence_length"]))
