"""Opens a causal language model and its tokenizer from a local folder or the hub, after refusing what cannot be right.

Everything is looked at before weights are read: the config, the architecture, the names and headers of all weight
files. Only safetensors are opened; a pickle can run code. Weights are read into memory all at once (``load``), or block
by block while they are needed (``open_model``).
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from matquant.config import ModelConfig
from matquant.errors import UserError
from matquant.models.blocks import compute_dtype
from matquant.models.checkpoint import (
    DTYPES,
    Checkpoint,
    Stored,
    build_skeleton,
    compute_buffers,
    fill,
    read_headers,
    tie_equal,
)
from matquant.models.index import INDEX, index_names, read_json

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that can hold a tokenizer; one of them is enough. The settings alone are not.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "vocab.model",
    "tekken.json",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")

_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMED = 5  # names of tensors or files in one sentence


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to be read and run.

    Attributes:
        model: in eval mode, without gradients, its cache off, its weights in ``dtype``: on the CPU after ``load``, on the
            meta device (they hold nothing) after ``open_model``.
        checkpoint: reads the weights that are on the meta device.
        tokenizer: of Transformers.
        label: what results call the model.
        dtype: of the weights: as stored, unless ``model.dtype`` asks for another.
        fingerprint: JSON-able, the same for the same weights, config and tokenizer.
        warnings: sentences about what is odd but no error.
    """

    model: Any
    checkpoint: Checkpoint
    tokenizer: Any
    label: str
    dtype: torch.dtype
    fingerprint: dict[str, Any]
    warnings: list[str]

    @property
    def context_length(self) -> int | None:
        """The longest window that the model was made for, in tokens; None when its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def compute_dtype(self, device: torch.device | str) -> torch.dtype:
        """float32 on a CPU, else ``dtype``."""
        return compute_dtype(self.dtype, device)


def load(model: ModelConfig) -> LoadedModel:
    """``open_model`` with all weights in memory."""
    loaded = open_model(model)
    fill(loaded.model, loaded.checkpoint)
    return loaded


def open_model(model: ModelConfig) -> LoadedModel:
    """Check the model that a config names and make it ready to be read block by block.

    Raises:
        UserError: the folder or hub repository is not there or cannot be reached, holds no safetensors, no tokenizer or
            no causal language model, is damaged, incomplete or quantized already, or needs code that was not allowed.
    """
    folder = _local_folder(model) if model.path is not None else _from_hub(model)
    config = _read_config(folder, model.trust_remote_code)
    files = weight_files(folder)
    headers = read_headers(folder, files)
    stored = _stored_dtype(folder, headers)
    tokenizer = _load_tokenizer(folder, model.trust_remote_code)
    warnings: list[str] = []
    dtype = _choose_dtype(model.dtype, stored, config, warnings)
    module, checkpoint = _skeleton(folder, config, headers, dtype, model.trust_remote_code, warnings)
    label = model.label or PurePosixPath(str(model.path or model.name)).name
    fingerprint = _fingerprint(model, folder, files) | {"dtype": str(dtype).removeprefix("torch.")}
    return LoadedModel(module, checkpoint, tokenizer, label, dtype, fingerprint, warnings)


# Where the files are


def _local_folder(model: ModelConfig) -> Path:
    folder = Path(str(model.path)).expanduser()
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise UserError(f"model.path={folder} is no folder: {found}. Give the folder of a Hugging Face checkpoint.")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The folder {folder} has no config.json, so it is no Hugging Face checkpoint. Is it the right one?"
        )
    return folder


def _from_hub(model: ModelConfig) -> Path:
    """The snapshot in the hub's cache; only files that are needed are fetched, and weights after everything else."""
    small = ["config.json", "generation_config.json", INDEX, *TOKENIZERS, *TOKENIZER_SETTINGS, "chat_template.jinja"]
    if model.trust_remote_code:
        small.append("*.py")
    folder = _snapshot(model, model.revision, small)
    if not (folder / "config.json").is_file():
        raise UserError(f"{model.name} on the hub has no config.json, so it is no checkpoint of Transformers.")
    _read_config(folder, model.trust_remote_code)  # refuse before gigabytes are fetched
    names = index_names(folder) if (folder / INDEX).is_file() else [WEIGHTS]
    # By commit, so that a push in between cannot mix two versions.
    folder = _snapshot(model, folder.name, [*small, *names])
    if names == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        _refuse_weights(f"{model.name} on the hub", _hub_files(model))
    return folder


def _snapshot(model: ModelConfig, revision: str | None, patterns: Sequence[str]) -> Path:
    name = str(model.name)
    instead = "Or give a local folder with model.path."
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the hub. Accept its terms on its page there, then log in with `hf auth login`. "
            f"{instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} on the hub has no revision {revision!r}. Correct model.revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no model {name!r} on the hub, or it is private and you are not logged in (`hf auth login`). "
            f"Correct model.name. {instead}"
        ) from error
    except Exception as error:  # not cached, no network, a proxy: the client raises its HTTP library's errors too
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name} is not (or not completely) in the hub's cache, and the hub could not be reached: {reason}. "
            f"Try again with a network, without HF_HUB_OFFLINE. {instead}"
        ) from error


def _hub_files(model: ModelConfig) -> list[str]:
    try:
        return HfApi().list_repo_files(str(model.name), revision=model.revision)
    except Exception:  # only to say more in a sentence that is raised anyway
        return []


# What the files say


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown")
        raise UserError(
            f"The checkpoint in {folder} is quantized already (quant_method {method}). "
            "Give the model in its original precision."
        )
    kind, remote = raw.get("model_type"), raw.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if remote:
            raise UserError(
                f"The model in {folder} needs code of its own, that this program would run. If you trust it, "
                "set model.trust_remote_code=true."
            )
        raise UserError(
            f"The installed transformers does not know the model type {kind!r} of {folder}. A newer one may: "
            "pip install --upgrade transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and remote code raise anything
        raise UserError(f"The config.json in {folder} cannot be read by transformers: {error}") from error
    _check_causal(folder, raw, config, "AutoModelForCausalLM" in remote and trust_remote_code)
    return config


def _check_causal(folder: Path, raw: dict[str, Any], config: Any, remote: bool) -> None:
    known = {
        n
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for n in ([names] if isinstance(names, str) else names)
    }
    architectures = raw.get("architectures") or []
    fits = not architectures or any(name in known for name in architectures)
    if not remote and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not fits):
        found = ", ".join(architectures) or raw.get("model_type")
        raise UserError(
            f"The model in {folder} is no causal language model: its architecture is {found}. "
            "Give one that predicts the next token, such as LlamaForCausalLM."
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors that a checkpoint is made of, all of which exist inside its folder.

    Raises:
        UserError: there are none, or the index is damaged, or names a file that is missing or not in the folder.
    """
    if (folder / INDEX).is_file():
        names = index_names(folder)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"The checkpoint in {folder} is not complete: of {len(names)} weight files that {INDEX} names, these "
                f"are missing: {_some(missing)}. Copy or download it again."
            )
        return names
    if not (folder / WEIGHTS).is_file():
        _refuse_weights(str(folder), sorted(file.name for file in folder.iterdir()))
    return [WEIGHTS]


def _refuse_weights(where: str, files: Sequence[str]) -> NoReturn:
    if any(file.endswith(".safetensors") for file in files):
        raise UserError(f"{where} has neither {WEIGHTS} nor {INDEX}; transformers finds weights under no other name.")
    if any(file.endswith(PICKLES) for file in files):
        raise UserError(
            f"{where} holds its weights as pickles only (*.bin, *.pt), which can run code when they are opened. If you "
            "trust them, convert them: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER), then the "
            "tokenizer the same way with AutoTokenizer, and give model.path=FOLDER."
        )
    raise UserError(f"{where} holds no weights: there is neither {WEIGHTS} nor {INDEX}.")


def _stored_dtype(folder: Path, headers: Mapping[str, Stored]) -> torch.dtype:
    """The float dtype of most of the stored numbers."""
    numbers: Counter[str] = Counter()
    for tensor in headers.values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    stored = max(numbers, key=numbers.__getitem__) if numbers else "none"
    if stored not in _FLOATS:
        raise UserError(
            f"The weights in {folder} are stored as {stored}. Give the model in its original precision: "
            "float32, float16 or bfloat16."
        )
    return DTYPES[stored]


def _choose_dtype(asked: str, stored: torch.dtype, config: Any, warnings: list[str]) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    said = getattr(config, "dtype", None)
    if isinstance(said, torch.dtype) and said != stored:
        warnings.append(
            f"config.json says {said}, but the weights are stored as {stored}; they are used as stored. "
            "model.dtype chooses another."
        )
    return torch.float32 if stored == torch.float64 else stored


# Loading


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZERS) and not (
        trust_remote_code and (folder / "tokenizer_config.json").is_file()
    ):
        raise UserError(
            f"The folder {folder} has no tokenizer (tokenizer.json or another form). Copy the tokenizer's files there, "
            "or save it with AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER)."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise bare Exceptions
        raise UserError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def _skeleton(
    folder: Path, config: Any, headers: Mapping[str, Stored], dtype: torch.dtype, trust_remote_code: bool,
    warnings: list[str],
) -> tuple[Any, Checkpoint]:  # fmt: skip
    """The model without weights but with all that is not stored, and the checkpoint that has the weights."""
    config.use_cache = config.get_text_config().use_cache = False
    try:
        with _quiet():
            module, info = build_skeleton(config, headers, dtype, trust_remote_code)
            _check_keys(folder, type(module).__name__, info, warnings)
            checkpoint = Checkpoint(module, headers)
            tie_equal(module, checkpoint)
            compute_buffers(module, checkpoint)
            if (folder / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"transformers cannot load the model in {folder}: {error}") from error
    module.config.name_or_path = str(folder)
    return module, checkpoint


def _check_keys(folder: Path, kind: str, info: Mapping[str, Any], warnings: list[str]) -> None:
    if wrong := sorted(f"{name} is {list(stored)}, needs {list(own)}" for name, stored, own in info["mismatched_keys"]):
        raise UserError(
            f"Weights in {folder} do not fit its config.json: {_some(wrong)}. Correct the config or the weights."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The checkpoint in {folder} lacks {len(missing)} weights that its architecture needs: {_some(missing)}. "
            "They would be random numbers. Copy or download it again."
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.append(f"{len(unused)} weights of the checkpoint are not used by {kind}: {_some(unused)}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its load report: what matters in it is raised or handed back."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# Fingerprints


def _fingerprint(model: ModelConfig, folder: Path, files: Sequence[str]) -> dict[str, Any]:
    names = ["config.json", *files, *(n for n in (*TOKENIZERS, *TOKENIZER_SETTINGS) if (folder / n).is_file())]
    if model.trust_remote_code:
        names += sorted(file.name for file in folder.glob("*.py"))
    if model.path is not None:
        return {"source": "folder", "files": {name: _sha256(folder / name) for name in sorted(names)}}
    # The cache names a blob by its content already (where it can link), so gigabytes need not be hashed again.
    paths = {name: folder / name for name in sorted(names)}
    blobs = {name: path.resolve().name if path.is_symlink() else _sha256(path) for name, path in paths.items()}
    return {"source": "hub", "name": model.name, "commit": folder.name, "files": blobs}


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"The file {file} cannot be read: {error.strerror or error}.") from error


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
