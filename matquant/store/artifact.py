"""Finished artifacts: a folder with a manifest, and the verification of its files.

``manifest.json`` lists the SHA-256 and the size of every file, the inputs that determine the artifact, and versions of
tools. It has no time stamps, so that equal content has equal bytes.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.store.files import DamageError, FileRecord, check_content, translate_os_errors
from matquant.store.json_files import hash_json, read_json
from matquant.store.tensor_files import read_tensors
from matquant.version import version

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEY_DIGITS = 24
MANIFEST = "manifest.json"
RESERVED_KINDS = ("locks", "partial", "trash")  # other folders of the store
_FIELD_TYPES = {
    "kind": str,
    "format": int,
    "inputs": dict,
    "about": dict,
    "tools": dict,
    "files": dict,
    "sha256": str,
    "seal": str,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """Finished artifact. Its files were verified when it was opened.

    Attributes:
        path: folder of the artifact.
        kind: name of the stage's output, such as ``parent``.
        key: hash of the inputs; also the name of the folder.
        sha256: hash over the names and hashes of the files. Artifacts with equal content have equal hashes.
        bytes: total size of the files, without the manifest.
        about: JSON facts about the content, from the build.
        inputs: JSON of everything that determines the content.
        files: SHA-256 of each file by name.
        reused: False if this call built the artifact.
        notes: sentences on damage that was found and repaired.
    """

    path: Path
    kind: str
    key: str
    sha256: str
    bytes: int
    about: dict[str, Any]
    inputs: dict[str, Any]
    files: Mapping[str, str]
    reused: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)

    def names(self) -> list[str]:
        """Sorted names of the files."""
        return sorted(self.files)

    def read_tensors(self, name: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
        """Read the tensors (on the CPU, memory-mapped) and the metadata of one file.

        Raises:
            ValueError: the artifact has no file of that name.
            UserError: the file was removed or damaged after the artifact was opened.
        """
        return read_tensors(self._file(name))

    def read_json(self, name: str) -> Any:
        """Read one JSON file. Raises the errors of ``read_tensors``."""
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"The artifact {self.path} has no file {name!r}; it has {', '.join(self.names())}.")
        return self.path / name


def artifact_key(kind: str, inputs: dict[str, Any]) -> str:
    """Folder name of the artifact of ``kind`` that ``inputs`` determine.

    Args:
        inputs: in the form that ``normalize_json`` returns.

    Raises:
        ValueError: ``kind`` is not a valid kind of artifact.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", kind) or kind in RESERVED_KINDS:
        raise ValueError(
            f"{kind!r} is not a kind of artifact: use lower-case letters, digits and '_', and none of "
            f"{', '.join(RESERVED_KINDS)}."
        )
    return hash_json({"kind": kind, "format": FORMAT, "inputs": inputs})[:KEY_DIGITS]


def check_file_name(name: Any) -> str:
    """Return ``name`` if it is a plain file name of an artifact: no folder, no hidden file, not the manifest.

    Raises:
        ValueError: ``name`` is anything else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name) or name == MANIFEST:
        raise ValueError(
            f"{str(name)[:80]!r} is not a plain file name: use letters, digits and ._- only, and not {MANIFEST}"
        )
    return name


def make_manifest(
    kind: str, inputs: dict[str, Any], about: dict[str, Any], files: Mapping[str, FileRecord]
) -> dict[str, Any]:
    """Manifest of an artifact with these files. Its last field, ``seal``, is the hash of the other fields."""
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "inputs": inputs,
        "about": about,
        "tools": _tool_versions(),
        "files": {name: record.to_json() for name, record in files.items()},
        "sha256": _content_hash(files),
    }
    return {**manifest, "seal": hash_json(manifest)}


def read_artifact(folder: Path, verify: bool = True) -> Artifact:
    """Open the artifact in ``folder`` and check its manifest field by field.

    Args:
        verify: also read every file and compare its SHA-256; else names and sizes only are checked.

    Raises:
        DamageError: the artifact is missing, or differs from its manifest or its key.
        UserError: the folder cannot be read.
    """
    check_file_type(folder, stat.S_ISDIR)
    check_file_type(folder / MANIFEST, stat.S_ISREG)
    with translate_os_errors(folder / MANIFEST):
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            records = _check_manifest(manifest, folder.parent.name, folder.name)
        except FileNotFoundError as error:
            raise DamageError(f"{MANIFEST} is missing") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise DamageError(f"{MANIFEST} is unreadable ({error})") from error
    for name, record in records.items():
        check_file(folder / name, record, verify)
    content = {field: manifest[field] for field in ("kind", "sha256", "about", "inputs")}
    files = {name: record.sha256 for name, record in records.items()}
    return Artifact(path=folder, key=folder.name, bytes=sum(r.size for r in records.values()), files=files, **content)


def check_file(path: Path, record: FileRecord, verify: bool = True) -> None:
    """Compare a file's size with ``record``, and its SHA-256 if ``verify``.

    Raises:
        DamageError: the file is missing, is not a regular file, or has other content.
    """
    check_file_type(path, stat.S_ISREG)
    with translate_os_errors(path):
        try:
            check_content(path, record, verify)
        except FileNotFoundError as error:
            raise DamageError(f"{path.name} is missing") from error


def check_file_type(path: Path, is_type: Callable[[int], bool]) -> os.stat_result:
    """Return the status of ``path``, whose mode must satisfy ``is_type``. Links are not followed.

    Raises:
        DamageError: the path is missing or of another type.
    """
    with translate_os_errors(path):
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamageError(f"{path.name} is missing") from error
    if not is_type(status.st_mode):
        raise DamageError(f"{path.name} is a link or another file type that the store never writes")
    return status


def _check_manifest(manifest: Any, kind: str, key: str) -> dict[str, FileRecord]:
    """Check an untrusted manifest and return its file records. Raises ValueError."""
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    for field, field_type in _FIELD_TYPES.items():
        if type(manifest.get(field)) is not field_type:
            raise ValueError(f"its field {field!r} is missing or has the wrong type")
    records = {check_file_name(name): FileRecord.parse(value) for name, value in manifest["files"].items()}
    if manifest["sha256"] != _content_hash(records):
        raise ValueError("its sha256 is not the hash of its files")
    if (manifest["kind"], manifest["format"], artifact_key(kind, manifest["inputs"])) != (kind, FORMAT, key):
        raise ValueError("its kind, format and inputs do not belong to this key")
    if manifest["seal"] != hash_json({field: value for field, value in manifest.items() if field != "seal"}):
        raise ValueError("it does not match its seal")
    return records


def _content_hash(records: Mapping[str, FileRecord]) -> str:
    return hash_json({name: record.sha256 for name, record in records.items()})


def _tool_versions() -> dict[str, str]:
    versions = {"matquant": version()}
    for name in ("torch", "safetensors", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
