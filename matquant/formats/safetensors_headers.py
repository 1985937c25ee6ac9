"""Headers of safetensors files: names, shapes and dtypes of the tensors, without their values."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from matquant.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in a safetensors file: file, shape, and dtype in the notation of the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, StoredTensor]:
    """Read the headers of the named files of a folder: tensors by name.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for name in files:
        file = folder / name
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a dict)
                    part = tensors.get_slice(key)
                    found[key] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"The weight file {file} is damaged ({error}). Copy or download it again.") from error
    return found
