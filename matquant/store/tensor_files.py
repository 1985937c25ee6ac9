"""Safetensors files with deterministic bytes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from matquant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def serialize_tensors(tensors: dict[str, "Tensor"], metadata: dict[str, str] | None) -> list[bytes | memoryview]:
    """Header and data of a safetensors file. Equal tensors and metadata give equal bytes."""
    from safetensors.torch import save  # late: it imports torch, which takes seconds that --help must not take

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    data_start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_start])
    if metadata:  # safetensors sorts tensors, but writes metadata in hash-map order, which differs from run to run
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return [len(text).to_bytes(8, "little") + text, memoryview(content)[data_start:]]


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read the tensors (on the CPU, memory-mapped) and the metadata of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The file {path} cannot be read: {error}. Run the same command again to rebuild it."
        ) from error
