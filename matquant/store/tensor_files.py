"""Safetensors files with deterministic bytes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from matquant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def serialize_tensors(tensors: dict[str, "Tensor"], metadata: dict[str, str] | None) -> list[bytes | memoryview]:
    """Header and data of a safetensors file. Equal tensors and metadata give equal bytes.

    The data are views of the tensors on the CPU, not copies: the state of a training may take half of the memory.
    """
    import torch  # late: it takes seconds that --help must not take
    from safetensors.torch import save

    # The format's own order, and its names of dtypes, are those of a file of the same tensors without elements.
    content = save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()}, metadata=metadata)
    header = json.loads(content[8:])
    if metadata:  # safetensors sorts tensors, but writes metadata in hash-map order, which differs from run to run
        header["__metadata__"] = dict(sorted(metadata.items()))
    data: list[memoryview] = []
    end = 0
    for name in (name for name in header if name != "__metadata__"):
        values = tensors[name].detach().cpu().contiguous()
        data.append(values.view(-1).view(torch.uint8).numpy().data)
        start, end = end, end + values.nbytes
        header[name] |= {"shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return [len(text).to_bytes(8, "little") + text, *data]


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
