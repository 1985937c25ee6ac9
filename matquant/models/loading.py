"""Opens a causal language model and its tokenizer from a local folder or the hub, after refusing what cannot be right.

Everything is looked at before weights are read: the config, the architecture, the names and headers of all weight
files. Only safetensors are opened; a pickle can run code. Weights are read into memory all at once (``load``), or block
by block while they are needed (``open_model``).
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from matquant.config import ModelConfig
from matquant.errors import UserError
from matquant.formats.safetensors_headers import DTYPES, StoredTensor, read_headers
from matquant.models.blocks import compute_dtype
from matquant.models.checkpoint import Checkpoint, build_skeleton, compute_buffers, fill, tie_equal
from matquant.models.checkpoint_files import (
    TOKENIZERS,
    fingerprint,
    from_hub,
    local_folder,
    read_config,
    some,
    weight_files,
)

_FLOATS = ("F64", "F32", "F16", "BF16")


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
    folder = local_folder(model) if model.path is not None else from_hub(model)
    config = read_config(folder, model.trust_remote_code)
    files = weight_files(folder)
    headers = read_headers(folder, files)
    stored = _stored_dtype(folder, headers)
    tokenizer = _load_tokenizer(folder, model.trust_remote_code)
    warnings: list[str] = []
    dtype = _choose_dtype(model.dtype, stored, config, warnings)
    module, checkpoint = _skeleton(folder, config, headers, dtype, model.trust_remote_code, warnings)
    label = model.label or PurePosixPath(str(model.path or model.name)).name
    content = fingerprint(model, folder, files) | {"dtype": str(dtype).removeprefix("torch.")}
    return LoadedModel(module, checkpoint, tokenizer, label, dtype, content, warnings)


def _stored_dtype(folder: Path, headers: Mapping[str, StoredTensor]) -> torch.dtype:
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
    folder: Path,
    config: Any,
    headers: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    trust_remote_code: bool,
    warnings: list[str],
) -> tuple[Any, Checkpoint]:
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
            f"Weights in {folder} do not fit its config.json: {some(wrong)}. Correct the config or the weights."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The checkpoint in {folder} lacks {len(missing)} weights that its architecture needs: {some(missing)}. "
            "They would be random numbers. Copy or download it again."
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.append(f"{len(unused)} weights of the checkpoint are not used by {kind}: {some(unused)}.")


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
