"""A finished artifact with its manifest, and the draft that it grows from."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from matquant.store.files import (
    MANIFEST,
    Damage,
    Record,
    append_line,
    check_file,
    children,
    delete,
    explained,
    hash_json,
    plain_name,
    pretty_json,
    read_json,
    read_tensors,
    require,
    safetensors_parts,
    sync_folder,
    to_plain,
    write_atomically,
)
from matquant.version import __version__

FORMAT = 1
KEY_DIGITS = 24
JOURNAL = ".journal"
RESERVED_KINDS = ("locks", "partial", "trash")
MANIFEST_FIELDS = {"kind": str, "format": int, "inputs": dict, "about": dict, "tools": dict, "files": dict}
MANIFEST_FIELDS |= {"sha256": str, "seal": str}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A finished artifact, whose bytes were verified when it was opened."""

    path: Path
    kind: str
    key: str
    sha256: str  # over the names and hashes of its files: two artifacts with the same content agree on it
    bytes: int  # of its files, the manifest not counted
    about: dict[str, Any]
    inputs: dict[str, Any]
    files: Mapping[str, str]  # name -> SHA-256
    reused: bool = True  # False: this call built it
    notes: list[str] = dataclasses.field(default_factory=list)  # sentences on damage that was found and mended

    def names(self) -> list[str]:
        """The names of its files, sorted."""
        return sorted(self.files)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors (on the CPU, mapped from the file as they are touched) and the metadata of one file.

        Raises:
            ValueError: the artifact has no file of that name.
            UserError: the file was removed or damaged since the artifact was opened.
        """
        return read_tensors(self._file(name))

    def read_json(self, name: str) -> Any:
        """The content of one JSON file. Raises what ``read_tensors`` raises."""
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"The artifact {self.path} has no file {name!r}; it has {', '.join(self.names())}.")
        return self.path / name


class Draft:
    """A build that is under way. What was written once survives a crash; the build asks ``has`` and goes on from there.

    Only files that this build wrote, read or found with ``has`` become part of the artifact, so that a resumed build
    gives the same artifact as an undisturbed one. A build does, block by block:

        if not draft.has("block_0.safetensors"):
            draft.write_tensors("block_0.safetensors", quantize(block))
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.confirmed: dict[str, Record] = {}  # what goes into the artifact
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
            self._journal = _read_journal(path / JOURNAL)
        self.resumed = bool(self._journal)

    def has(self, name: str) -> bool:
        """Whether the file was written completely and still has the same bytes; if not, what is there is deleted.

        Raises:
            ValueError: ``name`` is not a plain file name.
        """
        path = self.path / plain_name(name)
        record = self._journal.get(name)
        try:
            if record is not None:
                check_file(path, record)
                self.confirmed[name] = record
                return True
        except Damage as damage:
            self.notes.append(f"The unfinished build {self.path} is damaged: {damage}. That part is built again.")
            logger.warning(self.notes[-1])
        self._journal.pop(name, None)
        self.confirmed.pop(name, None)
        with explained(path):
            delete(path)
        return False

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, durable when this returns. The same tensors and metadata give the same bytes.

        Raises:
            ValueError: ``name`` is not a plain file name.
            UserError: the disk is full, or the store cannot be written.
        """
        plain_name(name)
        self._write(name, safetensors_parts(tensors, metadata))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, its keys sorted. Raises what ``write_tensors`` raises; ValueError also for NaN."""
        plain_name(name)
        self._write(name, [pretty_json(to_plain(value))])

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors (on the CPU) and metadata of a file that ``has`` finds. Raises ValueError when it does not."""
        return read_tensors(self._file(name))

    def read_json(self, name: str) -> Any:
        """The content of a JSON file that ``has`` finds. Raises ValueError when it does not."""
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        if name not in self.confirmed and not self.has(name):
            raise ValueError(f"The unfinished build {self.path} has no sound file {name!r}; ask has() first.")
        return self.path / name

    def _write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        record = write_atomically(self.path / name, parts)
        append_line(self.path / JOURNAL, json.dumps({"name": name, **record.to_json()}).encode())
        sync_folder(self.path)
        self._journal[name] = self.confirmed[name] = record


def artifact_key(kind: str, inputs: dict[str, Any]) -> str:
    """The folder name of what ``inputs`` (as ``to_plain`` gives them) determine. Raises ValueError for a wrong kind."""
    if not re.fullmatch("[a-z][a-z0-9_]*", kind) or kind in RESERVED_KINDS:
        raise ValueError(f"{kind!r} cannot be a kind of artifact: lower-case letters, digits and '_' make one.")
    return hash_json({"kind": kind, "format": FORMAT, "inputs": inputs})[:KEY_DIGITS]


def commit(draft: Draft, folder: Path, inputs: dict[str, Any], about: dict[str, Any]) -> None:
    """Give the draft its manifest and its final name. No time stamps: the same content is the same bytes.

    Raises:
        UserError: the disk is full, or the store cannot be written.
    """
    files = {name: record.to_json() for name, record in draft.confirmed.items()}
    manifest = {"kind": folder.parent.name, "format": FORMAT, "inputs": inputs, "about": about, "tools": _tools()}
    manifest |= {"files": files, "sha256": _content_hash(draft.confirmed)}
    manifest["seal"] = hash_json(manifest)  # over the manifest itself, whose `about` matters as much as the files
    for stray in children(draft.path):
        if stray.name not in files and stray.name != JOURNAL:
            delete(stray)
    write_atomically(draft.path / MANIFEST, [pretty_json(manifest)])
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(draft.path, folder)
        sync_folder(folder.parent)
        # Only now: had it gone before the rename, a crash between the two would have cost the whole build.
        (folder / JOURNAL).unlink(missing_ok=True)


def read_artifact(folder: Path, deep: bool = True) -> Artifact:
    """The artifact in ``folder``, its manifest checked field by field; ``deep`` also reads and hashes its files.

    Raises:
        Damage: it is not there, or is not what its manifest and its key say.
        UserError: it cannot be read.
    """
    require(folder, stat.S_ISDIR)
    require(folder / MANIFEST, stat.S_ISREG)
    with explained(folder / MANIFEST):
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            records = _check_manifest(manifest, folder.parent.name, folder.name)
        except FileNotFoundError as error:
            raise Damage(f"{MANIFEST} is missing") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise Damage(f"{MANIFEST} is unreadable ({error})") from error
    for name, record in records.items():
        check_file(folder / name, record, deep)
    content = {field: manifest[field] for field in ("kind", "sha256", "about", "inputs")}
    files = {name: record.sha256 for name, record in records.items()}
    return Artifact(path=folder, key=folder.name, bytes=sum(r.size for r in records.values()), files=files, **content)


def _check_manifest(manifest: Any, kind: str, key: str) -> dict[str, Record]:
    """The records of the files in a manifest that may be hostile. Raises ValueError."""
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    for field, wanted in MANIFEST_FIELDS.items():
        if type(manifest.get(field)) is not wanted:
            raise ValueError(f"its field {field!r} is missing or has the wrong type")
    records = {plain_name(name): Record.parse(value) for name, value in manifest["files"].items()}
    if manifest["sha256"] != _content_hash(records):
        raise ValueError("its sha256 is not that of its files")
    if (manifest["kind"], manifest["format"], artifact_key(kind, manifest["inputs"])) != (kind, FORMAT, key):
        raise ValueError("its kind, format and inputs do not belong under this key")
    if manifest["seal"] != hash_json({field: value for field, value in manifest.items() if field != "seal"}):
        raise ValueError("it does not match its seal")
    return records


def _content_hash(records: Mapping[str, Record]) -> str:
    return hash_json({name: record.sha256 for name, record in records.items()})


def _tools() -> dict[str, str]:
    tools = {"matquant": __version__}
    for name in ("torch", "safetensors", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tools[name] = importlib.metadata.version(name)
    return tools


def _read_journal(path: Path) -> dict[str, Record]:
    """The last record of each name. A torn line is skipped: its file then counts as not written."""
    records = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            records[plain_name(value.get("name") if isinstance(value, dict) else None)] = Record.parse(value)
    return records
