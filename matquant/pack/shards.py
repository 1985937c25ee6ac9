"""Safetensors files that are written tensor by tensor, so that memory does not grow with the model.

The format (a length, a JSON header, then the bytes of all tensors without a gap) lets a file be written in one pass once all
shapes are known. The library itself writes only what is in memory as a whole.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matquant.formats.packed import TensorSpec
from matquant.formats.safetensors_headers import DTYPES
from matquant.store.files import FileRecord, translate_os_errors
from matquant.store.json_files import pretty_json

_CODES = {dtype: code for code, dtype in DTYPES.items()}
Section = Mapping[str, TensorSpec]


class TensorFile:
    """One safetensors file whose tensors are given in their order in the file."""

    def __init__(self, path: Path, tensors: Section) -> None:
        self.path = path
        self._waiting = list(tensors.items())[::-1]
        self._digest, self._size = hashlib.sha256(), 0
        self._stream = open(path, "wb")  # noqa: SIM115 - closed by ``close``
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors.items():
            offsets = [end, end := end + spec.nbytes]
            header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format requires aligned data
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor. Raises ValueError for one that is not the next of the file."""
        expected, spec = self._waiting.pop()
        if name != expected or TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(
                f"{self.path.name}: {expected} {spec} comes next, not {name} {tensor.dtype} {tensor.shape}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._put(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def close(self) -> FileRecord:
        """The record of the finished file. Raises ValueError when tensors are still to come."""
        self._stream.close()
        if self._waiting:
            raise ValueError(f"{self.path.name} still waits for {self._waiting[-1][0]}")
        return FileRecord(self._digest.hexdigest(), self._size)

    def abandon(self) -> None:
        self._stream.close()

    def _put(self, part: bytes | memoryview) -> None:
        with translate_os_errors(self.path, len(part)):
            self._stream.write(part)
        self._digest.update(part)
        self._size += len(part)


class ShardWriter:
    """All weight files of a checkpoint, written side by side, one open file for each section.

    Args:
        folder: where they go.
        sections: tensors in the order in which they come, section by section. No file holds tensors of two sections.
        limit: bytes of a file; only a single larger tensor exceeds it.
    """

    def __init__(self, folder: Path, sections: Sequence[Section], limit: int) -> None:
        self.folder = folder
        parts = [_split(section, limit) for section in sections]
        total = sum(map(len, parts))
        self._shards: list[tuple[str, Section]] = []
        self.sections: list[list[str]] = []  # names of the files of each section
        for split in parts:
            names = []
            for part in split:
                single = (
                    "model.safetensors"
                    if total == 1
                    else f"model-{len(self._shards) + 1:05d}-of-{total:05d}.safetensors"
                )
                self._shards.append((single, part))
                names.append(single)
            self.sections.append(names)
        self.place = {name: file for file, part in self._shards for name in part}  # file of each tensor
        self._parts = dict(self._shards)
        self._left = {file: len(part) for file, part in self._shards}
        self._open: dict[str, TensorFile] = {}
        self.records: dict[str, FileRecord] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.abandon()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of its section. Raises ValueError for one out of turn, UserError when the disk is full."""
        file = self.place[name]
        if file not in self._open:
            with translate_os_errors(self.folder / file):
                self._open[file] = TensorFile(self.folder / file, self._parts[file])
        self._open[file].write(name, tensor)
        self._left[file] -= 1
        if not self._left[file]:
            self.records[file] = self._open.pop(file).close()

    def write_index(self, name: str, sections: int | None = None) -> None:
        """Write the index of the first ``sections`` sections, of all by default. Raises ValueError before the last tensor."""
        if any(self._left.values()):
            raise ValueError(f"tensors are missing in {', '.join(f for f, left in self._left.items() if left)}")
        files = {file for section in self.sections[:sections] for file in section}
        weights = {tensor: file for tensor, file in sorted(self.place.items()) if file in files}
        size = sum(spec.nbytes for file, part in self._shards if file in files for spec in part.values())
        with translate_os_errors(self.folder / name):
            (self.folder / name).write_bytes(pretty_json({"metadata": {"total_size": size}, "weight_map": weights}))


def aligned(tensors: Section) -> dict[str, TensorSpec]:
    """Tensors in an order in which each begins at a multiple of its element's size: large elements first."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def _split(section: Section, limit: int) -> list[dict[str, TensorSpec]]:
    """The section in parts of at most ``limit`` bytes, none of them empty."""
    parts: list[dict[str, TensorSpec]] = []
    size = 0
    for name, spec in section.items():
        if not parts or size + spec.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.nbytes
    return parts
