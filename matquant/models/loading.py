"""Loading of a causal language model and its tokenizer from a local folder or the hub.

Config, architecture, and names and headers of all weight files are checked before weights are read. Only safetensors
are opened, since a pickle can run code. ``load_model`` reads all weights into memory; after ``open_model`` they are
read block by block.
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

from matquant.errors import UserError, shorten
from matquant.formats.safetensors_headers import DTYPES, StoredTensor, read_headers
from matquant.models.blocks import compute_dtype
from matquant.models.checkpoint import Checkpoint, build_skeleton, fill, wrapper_renaming
from matquant.models.checkpoint_files import (
    MAX_NAMES,
    TOKENIZERS,
    fingerprint,
    hub_snapshot,
    local_folder,
    read_config,
    weight_files,
)
from matquant.models.computed_tensors import compute_tensors
from matquant.models.config import ModelConfig
from matquant.models.tied_weights import tie_equal

_FLOAT_CODES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Checked model with its tokenizer.

    Attributes:
        model: in eval mode, without gradients, with the KV cache disabled, weights in ``dtype``: on the CPU after
            ``load_model``, on the meta device (without values) after ``open_model``.
        checkpoint: reader of the weights that are on the meta device.
        tokenizer: of Transformers.
        label: name of the model in results.
        dtype: of the weights: as stored, or ``model.dtype``.
        fingerprint: JSON-able, equal for equal weights, config and tokenizer.
        warnings: sentences about irregularities that are no errors.
        renaming: of the checkpoint's tensors, see ``wrapper_renaming``.
    """

    model: Any
    checkpoint: Checkpoint
    tokenizer: Any
    label: str
    dtype: torch.dtype
    fingerprint: dict[str, Any]
    warnings: list[str]
    renaming: Mapping[str, str]

    @property
    def context_length(self) -> int | None:
        """Context length of the model in tokens; None if its config has none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def compute_dtype(self, device: torch.device | str) -> torch.dtype:
        """Dtype of the computation: float32 on a CPU, else ``dtype``."""
        return compute_dtype(self.dtype, device)


def load_model(model: ModelConfig) -> LoadedModel:
    """Check and load a model with all weights in memory. Raises the errors of ``open_model``."""
    loaded = open_model(model)
    fill(loaded.model, loaded.checkpoint)
    return loaded


def open_model(model: ModelConfig) -> LoadedModel:
    """Check a model and build it without weights, to be read block by block.

    Raises:
        UserError: the folder or hub repository does not exist or cannot be reached, holds no safetensors, no tokenizer
            or no causal language model, is damaged, incomplete or quantized already, or needs code that is not trusted.
    """
    folder = local_folder(model) if model.path is not None else hub_snapshot(model)
    config = read_config(folder, model.trust_remote_code)
    files = weight_files(folder)
    headers = read_headers(folder, files)
    stored = _stored_dtype(folder, headers)
    tokenizer = _load_tokenizer(folder, model.trust_remote_code)
    warnings: list[str] = []
    dtype = _choose_dtype(model.dtype, stored, config, warnings)
    renaming = wrapper_renaming(headers)
    module, checkpoint = _skeleton(folder, config, headers, dtype, model.trust_remote_code, renaming, warnings)
    label = model.label or _default_label(model)
    content = fingerprint(model, folder, files) | {"dtype": str(dtype).removeprefix("torch.")}
    return LoadedModel(module, checkpoint, tokenizer, label, dtype, content, warnings, renaming)


def _default_label(model: ModelConfig) -> str:
    """Name of a repository without its owner, or of a folder; of a snapshot in the hub's cache that of its repository."""
    if model.name is not None:
        return PurePosixPath(model.name).name
    folder = Path(str(model.path)).expanduser().resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _stored_dtype(folder: Path, headers: Mapping[str, StoredTensor]) -> torch.dtype:
    """Float dtype of most of the stored elements."""
    elements: Counter[str] = Counter()
    for tensor in headers.values():
        elements[tensor.dtype] += math.prod(tensor.shape)
    stored = max(elements, key=elements.__getitem__) if elements else "none"
    if stored not in _FLOAT_CODES:
        raise UserError(
            f"The weights in {folder} are stored as {stored}. Give the model in its original precision: float32, "
            "float16 or bfloat16."
        )
    return DTYPES[stored]


def _choose_dtype(setting: str, stored: torch.dtype, config: Any, warnings: list[str]) -> torch.dtype:
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype) and declared != stored:
        warnings.append(
            f"config.json says {declared}, but the weights are stored as {stored}; they are used as stored. "
            "Set model.dtype for another dtype."
        )
    return torch.float32 if stored == torch.float64 else stored


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZERS) and not (
        trust_remote_code and (folder / "tokenizer_config.json").is_file()
    ):
        raise UserError(
            f"The folder {folder} has no tokenizer (tokenizer.json or another format). Copy the tokenizer's files "
            "there, or save it with AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER)."
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
    renaming: Mapping[str, str],
    warnings: list[str],
) -> tuple[Any, Checkpoint]:
    """Model without weights but with all tensors that are not stored, and the reader of its checkpoint."""
    if renaming:
        example = next(iter(headers))
        warnings.append(
            f"The weights in {folder} have names that a wrapper of the model made, such as {example}: they were saved "
            "from a DataParallel, compiled or sharded model. The wrapper's part of the names is left out."
        )
    config.use_cache = config.get_text_config().use_cache = False
    try:
        with quiet_transformers():
            module, info = build_skeleton(config, headers, dtype, trust_remote_code, renaming)
            _check_keys(folder, type(module).__name__, info, warnings)
            checkpoint = Checkpoint(module, headers)
            tie_equal(module, checkpoint)
            compute_tensors(module, checkpoint)
            if (folder / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"transformers cannot load the model in {folder}: {error}") from error
    module.config.name_or_path = str(folder)
    return module, checkpoint


def _check_keys(folder: Path, kind: str, info: Mapping[str, Any], warnings: list[str]) -> None:
    """Raise UserError for missing or mismatched weights; add a warning for unused ones."""
    if wrong := sorted(f"{name} is {list(stored)}, needs {list(own)}" for name, stored, own in info["mismatched_keys"]):
        raise UserError(
            f"Weights in {folder} do not fit its config.json: {shorten(wrong, MAX_NAMES)}. Correct the config or the "
            "weights."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The checkpoint in {folder} lacks {len(missing)} weights that its architecture needs: "
            f"{shorten(missing, MAX_NAMES)}. Copy or download it again."
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.append(
            f"{len(unused)} weights of the checkpoint are not used by {kind}: {shorten(unused, MAX_NAMES)}."
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable Transformers' progress bars and load report; its findings become errors and warnings here."""
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
