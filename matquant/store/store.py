"""Content-addressed store: open or build, list, verify and clean artifacts; safe for concurrent processes."""

import contextlib
import dataclasses
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from matquant.errors import UserError
from matquant.store.artifact import KEY_DIGITS, RESERVED_KINDS, Artifact, artifact_key, read_artifact
from matquant.store.draft import Draft, commit
from matquant.store.files import DamageError, delete, list_folder, total_bytes, translate_os_errors, try_writing
from matquant.store.json_files import normalize_json

_LABEL = rf"[a-z][a-z0-9_]*-[0-9a-f]{{{KEY_DIGITS}}}"  # <kind>-<key>

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreEntry:
    """One artifact or draft in the store.

    Attributes:
        path: its folder.
        kind: kind of artifact.
        key: hash of the inputs.
        state: ``damaged`` is judged by names and sizes only; ``Store.verify`` reads the bytes.
        bytes: size on disk.
        modified: seconds since the epoch.
        sha256: content hash of a complete artifact.
        label: ``about["label"]`` of a complete artifact, if its stage set one.
    """

    path: Path
    kind: str
    key: str
    state: Literal["complete", "partial", "damaged"]
    bytes: int
    modified: float
    sha256: str | None = None
    label: str | None = None


class Store:
    """Artifacts under one folder. Concurrent processes may use the same folder."""

    def __init__(self, path: Path) -> None:
        """Open the store in ``path``. The first build creates the folder.

        Raises:
            UserError: ``path`` exists and is not a folder.
        """
        self.path = Path(path).expanduser().absolute()
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"The store {self.path} is not a folder. Set store.path to a folder, or to a new name.")

    def try_writing(self) -> None:
        """Write to the store and delete it again; a store that holds artifacts may be read-only.

        Raises:
            UserError: the store can neither be written nor read from.
        """
        try:
            try_writing(self.path, "store.path")
        except UserError:
            if not self._artifacts():
                raise

    def open_or_build(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Draft], dict[str, Any]]) -> Artifact:
        """Open and verify the artifact of ``kind`` that ``inputs`` determine; build it if it is missing or damaged.

        One process builds a key, and the others wait for its result. A build of a process that died is resumed.

        Args:
            kind: name of the stage's output, such as ``parent``: lower-case letters, digits and ``_``.
            inputs: JSON of everything that determines the content, and of nothing else.
            build: writes the files through the draft and returns ``about``, JSON facts about the content. ``ls`` shows
                the text under the key ``label``.

        Raises:
            ValueError, TypeError: ``kind`` is not a valid kind, or ``inputs`` or ``about`` have no JSON form.
            UserError: the disk is full, or the store cannot be read or written.
        """
        plain = normalize_json(dict(inputs))
        folder = self.path / kind / artifact_key(kind, plain)
        # Without the lock: a folder with its final name is complete, and many jobs can verify it at the same time.
        with contextlib.suppress(DamageError):
            return read_artifact(folder)
        with self._locked(f"{kind}-{folder.name}"):
            notes = []
            try:
                return read_artifact(folder)  # built or repaired by another process in the meantime
            except DamageError as damage:
                if os.path.lexists(folder):
                    notes.append(f"The artifact {folder} is damaged: {damage}. It is deleted and built again.")
                    logger.warning(notes[-1])
                    self._trash(folder)
            draft = Draft(self.path / "partial" / f"{kind}-{folder.name}")
            commit(draft, folder, plain, normalize_json(dict(build(draft))))
            return dataclasses.replace(read_artifact(folder, verify=False), reused=False, notes=notes + draft.notes)

    def open(self, kind: str, inputs: Mapping[str, Any]) -> Artifact:
        """Open an artifact that another process has just built or verified, without reading its files.

        Raises:
            DamageError: the artifact is missing or damaged.
        """
        return read_artifact(self.path / kind / artifact_key(kind, normalize_json(dict(inputs))), verify=False)

    def ls(self) -> list[StoreEntry]:
        """List all artifacts and drafts by kind and key. Reads manifests only."""
        drafts = [path for path in list_folder(self.path / "partial") if re.fullmatch(_LABEL, path.name)]
        entries = []
        for folder in self._artifacts() + drafts:
            with contextlib.suppress(FileNotFoundError):  # committed or deleted by another process in the meantime
                entries.append(_entry(folder, partial=folder in drafts))
        return sorted(entries, key=lambda entry: (entry.kind, entry.key))

    def verify(self) -> list[tuple[Path, str]]:
        """Read every byte of every artifact; return the folder and the damage of each damaged one."""
        found = ((folder, _find_damage(folder)) for folder in self._artifacts())
        return [(folder, damage) for folder, damage in found if damage is not None]

    def clean(self, everything: bool = False) -> int:
        """Delete unfinished drafts, damaged artifacts and stale locks; return the number of bytes freed.

        Builds of running processes are kept, and so are files that the store did not create.

        Args:
            everything: also delete complete artifacts.

        Raises:
            UserError: the store cannot be read or written.
        """
        labels = {f"{folder.parent.name}-{folder.name}" for folder in self._artifacts()}
        labels |= {path.name for path in list_folder(self.path / "partial")}
        labels |= {path.name.removesuffix(".lock") for path in list_folder(self.path / "locks")}
        freed = sum(self._clean(label, everything) for label in sorted(labels) if re.fullmatch(_LABEL, label))
        for leftover in list_folder(self.path / "trash"):  # of a process that was killed during a deletion
            if re.fullmatch(rf"{_LABEL}\.[0-9a-f]{{16}}", leftover.name):
                freed += total_bytes(leftover)
                delete(leftover)
        return freed

    def _clean(self, label: str, everything: bool) -> int:
        kind, _, key = label.rpartition("-")
        folder = self.path / kind / key
        with self._locked(label, wait=False) as held:
            if not held:
                return 0
            freed = self._trash(self.path / "partial" / label)
            if everything or _find_damage(folder) is not None:
                freed += self._trash(folder)
            # Deleted while the lock is held: filelock in a waiting process notices the missing name and retries.
            with contextlib.suppress(OSError):
                self._lock_path(label).unlink()
            return freed

    @contextlib.contextmanager
    def _locked(self, label: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of one key. Without ``wait``, yields False if another process holds it."""
        path = self._lock_path(label)
        lock = FileLock(path, poll_interval=0.2)
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = _try_acquire(lock)
            if wait and not held:
                logger.info("Waiting for another process that builds %s (lock file: %s).", label, path)
                lock.acquire()
                held = True
        try:
            yield held
        finally:
            if held:
                lock.release()

    def _lock_path(self, label: str) -> Path:
        return self.path / "locks" / f"{label}.lock"

    def _trash(self, folder: Path) -> int:
        """Delete a folder; a concurrent reader finds it complete or not at all. Returns the number of bytes freed."""
        if not os.path.lexists(folder):
            return 0
        size = total_bytes(folder)
        label = folder.name if folder.parent.name == "partial" else f"{folder.parent.name}-{folder.name}"
        target = self.path / "trash" / f"{label}.{secrets.token_hex(8)}"
        with translate_os_errors(folder):
            target.parent.mkdir(exist_ok=True)
            os.rename(folder, target)
            delete(target)
        return size

    def _artifacts(self) -> list[Path]:
        kinds = [path for path in list_folder(self.path) if path.name not in RESERVED_KINDS]
        folders = [folder for kind in kinds for folder in list_folder(kind)]
        return [folder for folder in folders if re.fullmatch(_LABEL, f"{folder.parent.name}-{folder.name}")]


def _try_acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _find_damage(folder: Path) -> str | None:
    """Description of an artifact's damage; None if it is undamaged, or was deleted by another process."""
    try:
        read_artifact(folder)
    except DamageError as damage:
        return str(damage) if os.path.lexists(folder) else None
    return None


def _entry(folder: Path, partial: bool) -> StoreEntry:
    """Entry of an artifact or a draft. Raises FileNotFoundError if the folder was deleted."""
    kind, _, key = (folder.name if partial else f"{folder.parent.name}-{folder.name}").rpartition("-")
    modified = folder.lstat().st_mtime
    entry = StoreEntry(path=folder, kind=kind, key=key, state="partial", bytes=total_bytes(folder), modified=modified)
    if partial:
        return entry
    try:
        artifact = read_artifact(folder, verify=False)
    except DamageError:
        return dataclasses.replace(entry, state="damaged")
    label = artifact.about.get("label")
    label = label if isinstance(label, str) else None
    return dataclasses.replace(entry, state="complete", sha256=artifact.sha256, bytes=artifact.bytes, label=label)
