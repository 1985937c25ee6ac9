"""GGUF files as input: their tensors are dequantized once, into a checkpoint of the store that the rest of the project reads.

Transformers reads config and tokenizer from the file's metadata, for the architectures that it supports.
"""

import dataclasses
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from matquant.errors import UserError
from matquant.formats.shard_index import INDEX
from matquant.models.config import ModelConfig
from matquant.store import Store, fingerprint_files
from matquant.store.draft import Draft

SUFFIX = ".gguf"
VOCABULARY_FILE = "vocabulary.gguf"  # of a converted checkpoint: the file's metadata on its vocabulary, for pack=gguf

_MAGIC = b"GGUF"
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_SHARD_SIZE = "4GB"

# Part of a checkpoint's key: raised when the same file gives another checkpoint than before.
_VERSION = 2

logger = logging.getLogger(__name__)


def is_gguf(model: ModelConfig) -> bool:
    """True if ``model.path`` names a GGUF file."""
    return model.path is not None and model.path.lower().endswith(SUFFIX)


def gguf_package(setting: str) -> Any:
    """The package gguf.

    Args:
        setting: that needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{setting} needs the package gguf, which is not installed: pip install 'matquant[gguf]'."
        ) from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it reports byte orders and plans
    return gguf


def read_tensors(file: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Values of some tensors of a GGUF file, as it stores them: float32 [..., rows, columns]."""
    package = gguf_package(str(file))
    for tensor in package.GGUFReader(file).tensors:
        if tensor.name in names:
            values = package.quants.dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, torch.from_numpy(np.ascontiguousarray(values))


def convert_gguf(model: ModelConfig, store: Store) -> tuple[ModelConfig, list[str]]:
    """Convert a GGUF file to a checkpoint of safetensors in the store; the same file is converted once.

    The whole model is in memory meanwhile: in float32, which holds every dequantized value, or in ``model.dtype``.

    Returns:
        The settings with the path of the checkpoint and the file's name as label, and warnings: a sentence that names the
        quantized types, since results compare with the dequantized model.

    Raises:
        UserError: the file is missing, damaged, one of several parts or of an unsupported architecture, or the package gguf
            is not installed.
    """
    file = Path(str(model.path)).expanduser()
    types = _tensor_types(file)
    dtype = "float32" if model.dtype == "auto" else model.dtype

    def build(draft: Draft) -> dict[str, Any]:
        logger.info("%s is converted to a %s checkpoint in the store, once.", file.name, dtype)
        _write_checkpoint(file, getattr(torch, dtype), draft)
        return {"label": file.name}

    inputs = {
        "sha256": fingerprint_files(file.parent, [file.name])[file.name],
        "dtype": dtype,
        "transformers": transformers.__version__,
        "version": _VERSION,
    }
    folder = store.open_or_build("checkpoint", inputs, build).path
    converted = dataclasses.replace(model, path=str(folder), label=model.label or file.stem)
    quantized = {name: count for name, count in types.items() if name not in _FLOAT_TYPES}
    if not quantized:
        return converted, []
    found = ", ".join(f"{count} of {name}" for name, count in sorted(quantized.items()))
    return converted, [
        f"{file.name} is a quantized file ({found}, of {sum(types.values())} tensors). Its dequantized weights count as the "
        "full-precision model here, so the loss of that quantization is in no figure."
    ]


def _tensor_types(file: Path) -> dict[str, int]:
    """Number of tensors of each GGUF type."""
    _check_file(file)
    package = gguf_package(f"model.path={file}")
    try:
        reader = package.GGUFReader(file)
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    except Exception as error:  # any error of the reader on a damaged file
        raise UserError(f"The GGUF file {file} is damaged: {error}. Copy or download it again.") from error
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise UserError(
            f"{file} is one of {parts.contents()} parts of a model. Merge them: llama-gguf-split --merge FIRST_PART OUT.gguf."
        )
    return types


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"model.path={file} is not a file. Give the path of a GGUF file, or of a checkpoint's folder.")
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise UserError(
                f"{file} is no GGUF file: it does not begin with {_MAGIC.decode()}. Copy or download it again."
            )


def _write_checkpoint(file: Path, dtype: torch.dtype, draft: Draft) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except Exception as error:  # Transformers raises anything for architectures and tokenizers that it does not know
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"Transformers {transformers.__version__} cannot load {file}: {reason}. "
            "Give the model's original checkpoint, or try a newer version: pip install --upgrade transformers gguf."
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            draft.write_bytes(path.name, path.read_bytes())
        _write_vocabulary(file, Path(folder, VOCABULARY_FILE))
        draft.write_bytes(VOCABULARY_FILE, Path(folder, VOCABULARY_FILE).read_bytes())
    _write_weights(model, draft)


def _write_vocabulary(file: Path, target: Path) -> None:
    """Copy the metadata on the vocabulary into a GGUF file without tensors."""
    package = gguf_package(f"model.path={file}")
    fields = package.GGUFReader(file).fields
    writer = package.GGUFWriter(target, fields["general.architecture"].contents())
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            elements = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], elements)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _write_weights(model: Any, draft: Draft) -> None:
    """Write the state dict in shards, tied tensors once."""
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=_SHARD_SIZE)
    for name, keys in shards.filename_to_tensors.items():
        draft.write_tensors(name, {key: tensors[key] for key in keys}, {"format": "pt"})
    if shards.is_sharded:
        draft.write_json(INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
