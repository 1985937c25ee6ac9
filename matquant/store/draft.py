"""Drafts: unfinished builds that survive a crash, and their commit as artifacts."""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matquant.store.artifact import MANIFEST, check_file, check_file_name, make_manifest
from matquant.store.files import (
    DamageError,
    FileRecord,
    append_line,
    delete,
    list_folder,
    sync_folder,
    translate_os_errors,
    write_atomically,
)
from matquant.store.json_files import normalize_json, pretty_json, read_json
from matquant.store.tensor_files import read_tensors, serialize_tensors

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = ".journal"

logger = logging.getLogger(__name__)


class Draft:
    """Unfinished build. Its complete files survive a crash, and a later build of the same key reuses them.

    Only files that this build wrote, read or found with ``has`` become part of the artifact. So a resumed build gives the
    same artifact as an uninterrupted one. A build that resumes block by block:

        if not draft.has("block_0.safetensors"):
            draft.write_tensors("block_0.safetensors", quantize(block))

    Attributes:
        path: folder of the draft.
        resumed: True if the draft has files of an earlier build.
        records: files that become part of the artifact.
        notes: sentences on damage that was found.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.records: dict[str, FileRecord] = {}
        with translate_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
            self._journal = _read_journal(path / JOURNAL)
        self.resumed = bool(self._journal)

    def has(self, name: str) -> bool:
        """Return True if the file is complete and undamaged. An incomplete or damaged file is deleted.

        Raises:
            ValueError: ``name`` is not a plain file name.
        """
        path = self.path / check_file_name(name)
        record = self._journal.get(name)
        try:
            if record is not None:
                check_file(path, record)
                self.records[name] = record
                return True
        except DamageError as damage:
            self.notes.append(f"The unfinished build {self.path} is damaged: {damage}. This file is built again.")
            logger.warning(self.notes[-1])
        self._journal.pop(name, None)
        self.records.pop(name, None)
        with translate_os_errors(path):
            delete(path)
        return False

    def write_tensors(self, name: str, tensors: dict[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file durably. Equal tensors and metadata give equal bytes.

        Raises:
            ValueError: ``name`` is not a plain file name.
            UserError: the disk is full, or the store cannot be written.
        """
        check_file_name(name)
        self._write(name, serialize_tensors(tensors, metadata))

    def discard(self, name: str) -> None:
        """Delete a file, so that it becomes no part of the artifact. A file that does not exist is no error."""
        path = self.path / check_file_name(name)
        self._journal.pop(name, None)
        self.records.pop(name, None)
        with translate_os_errors(path):
            delete(path)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file with sorted keys durably.

        Raises:
            ValueError: ``name`` is not a plain file name, or ``value`` has no JSON form. NaN and infinity have none.
            UserError: the disk is full, or the store cannot be written.
        """
        check_file_name(name)
        self._write(name, [pretty_json(normalize_json(value))])

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file durably.

        Raises:
            ValueError: ``name`` is not a plain file name.
            UserError: the disk is full, or the store cannot be written.
        """
        check_file_name(name)
        self._write(name, [content])

    def read_tensors(self, name: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
        """Read the tensors (on the CPU) and the metadata of a file. Raises ValueError if ``has`` is False for it."""
        return read_tensors(self._file(name))

    def read_json(self, name: str) -> Any:
        """Read a JSON file. Raises ValueError if ``has`` is False for it."""
        return read_json(self._file(name))

    def _file(self, name: str) -> Path:
        if name not in self.records and not self.has(name):
            raise ValueError(f"The unfinished build {self.path} has no complete file {name!r}; check has() first.")
        return self.path / name

    def _write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        size = sum(len(part) for part in parts)
        with translate_os_errors(self.path / name, size):
            record = write_atomically(self.path / name, *parts)
        line = json.dumps({"name": name, **record.to_json()}).encode()
        with translate_os_errors(self.path / JOURNAL, len(line)):
            append_line(self.path / JOURNAL, line)
            sync_folder(self.path)
        self._journal[name] = self.records[name] = record


def commit(draft: Draft, folder: Path, inputs: dict[str, Any], about: dict[str, Any]) -> None:
    """Write the draft's manifest and rename the draft to ``folder``.

    Raises:
        UserError: the disk is full, or the store cannot be written.
    """
    for entry in list_folder(draft.path):
        if entry.name not in draft.records and entry.name != JOURNAL:
            delete(entry)
    manifest = pretty_json(make_manifest(folder.parent.name, inputs, about, draft.records))
    with translate_os_errors(draft.path / MANIFEST, len(manifest)):
        write_atomically(draft.path / MANIFEST, manifest)
    with translate_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(draft.path, folder)
        sync_folder(folder.parent)
        # The journal is deleted last: a crash after an earlier deletion would discard the whole build.
        (folder / JOURNAL).unlink(missing_ok=True)


def _read_journal(path: Path) -> dict[str, FileRecord]:
    """Read the last record of each file name. Truncated lines are skipped: their files count as not written."""
    records = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            name = check_file_name(value.get("name") if isinstance(value, dict) else None)
            records[name] = FileRecord.parse(value)
    return records
