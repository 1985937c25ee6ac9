"""Opening, sharing and looking after artifacts, with any number of processes at the same time."""

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
from matquant.store.artifact import KEY_DIGITS, RESERVED_KINDS, Artifact, Draft, artifact_key, commit, read_artifact
from matquant.store.files import Damage, children, delete, explained, size_of, to_plain

LABEL = rf"[a-z][a-z0-9_]*-[0-9a-f]{{{KEY_DIGITS}}}"  # <kind>-<key>

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of ``Store.ls``. ``damaged`` is judged by names and sizes only; ``Store.verify`` reads the bytes."""

    path: Path
    kind: str
    key: str
    state: Literal["complete", "partial", "damaged"]
    bytes: int
    modified: float  # seconds since the epoch
    sha256: str | None = None  # of a complete one
    label: str | None = None  # about["label"], where the stage gave one


class Store:
    """The artifacts under one folder. Any number of processes may use it at the same time."""

    def __init__(self, path: Path) -> None:
        """The store in ``path``; the first build makes the folder.

        Raises:
            UserError: ``path`` is there and is not a folder.
        """
        self.path = Path(path).expanduser().absolute()
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"The store {self.path} is not a folder. Set store.path to a folder, or to a new name.")

    def open_or_build(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Draft], dict[str, Any]]) -> Artifact:
        """The artifact of ``kind`` that ``inputs`` determine: verified if there, built if missing or damaged.

        One process builds a key; others wait for it and take its result. A build that died is resumed from its draft.

        Args:
            kind: the stage's name for it, such as ``parent``: lower-case letters, digits and ``_``.
            inputs: JSON-able; everything that determines the content, and nothing else.
            build: writes the files through the draft and returns ``about``, JSON-able facts on the content. A text
                under ``label`` is what ``ls`` shows.

        Raises:
            ValueError, TypeError: ``kind`` is no such name; ``inputs`` or ``about`` are not JSON-able.
            UserError: the disk is full, or the store cannot be read or written.
        """
        plain = to_plain(dict(inputs))
        folder = self.path / kind / artifact_key(kind, plain)
        # Without the lock: an artifact is whole as soon as it has its name, and many jobs can verify it side by side.
        with contextlib.suppress(Damage):
            return read_artifact(folder)
        with self._locked(f"{kind}-{folder.name}"):
            notes = []
            try:
                return read_artifact(folder)  # another process may have built it, or mended it, meanwhile
            except Damage as damage:
                if os.path.lexists(folder):
                    notes.append(f"The artifact {folder} is damaged: {damage}. It is deleted and built again.")
                    logger.warning(notes[-1])
                    self._trash(folder)
            draft = Draft(self.path / "partial" / f"{kind}-{folder.name}")
            commit(draft, folder, plain, to_plain(dict(build(draft))))
            return dataclasses.replace(read_artifact(folder, deep=False), reused=False, notes=notes + draft.notes)

    def open(self, kind: str, inputs: Mapping[str, Any]) -> Artifact:
        """The artifact that ``inputs`` determine and that another process has just built or verified.

        Raises:
            UserError: it is not there.
        """
        return read_artifact(self.path / kind / artifact_key(kind, to_plain(dict(inputs))), deep=False)

    def ls(self) -> list[Entry]:
        """What is in the store, complete and partial, in the order of kinds and keys. Reads manifests only."""
        drafts = [path for path in children(self.path / "partial") if re.fullmatch(LABEL, path.name)]
        entries = []
        for folder in self._artifacts() + drafts:
            with contextlib.suppress(FileNotFoundError):  # finished or deleted by another process at this moment
                entries.append(_entry(folder, partial=folder in drafts))
        return sorted(entries, key=lambda entry: (entry.kind, entry.key))

    def verify(self) -> list[tuple[Path, str]]:
        """Read every byte of every artifact; the folder of each damaged one, and what is wrong with it."""
        found = ((folder, _problem(folder)) for folder in self._artifacts())
        return [(folder, problem) for folder, problem in found if problem is not None]

    def clean(self, everything: bool = False) -> int:
        """Delete unfinished drafts, damaged artifacts and stale locks, or ``everything``; the number of bytes freed.

        What a live process is building is left alone, and so is every file that the store did not make.

        Raises:
            UserError: the store cannot be read or written.
        """
        labels = {f"{folder.parent.name}-{folder.name}" for folder in self._artifacts()}
        labels |= {path.name for path in children(self.path / "partial")}
        labels |= {path.name.removesuffix(".lock") for path in children(self.path / "locks")}
        freed = sum(self._clean(label, everything) for label in sorted(labels) if re.fullmatch(LABEL, label))
        for leftover in children(self.path / "trash"):  # of a process that was killed while it deleted
            if re.fullmatch(rf"{LABEL}\.[0-9a-f]{{16}}", leftover.name):
                freed += size_of(leftover)
                delete(leftover)
        return freed

    def _clean(self, label: str, everything: bool) -> int:
        kind, _, key = label.rpartition("-")
        folder = self.path / kind / key
        with self._locked(label, wait=False) as held:
            if not held:
                return 0
            freed = self._trash(self.path / "partial" / label)
            if everything or _problem(folder) is not None:
                freed += self._trash(folder)
            with contextlib.suppress(OSError):  # while held, so that a waiter's filelock finds it nameless and retries
                self._lock_path(label).unlink()
            return freed

    @contextlib.contextmanager
    def _locked(self, label: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of one key. Without ``wait``, yields False when another holds it."""
        path = self._lock_path(label)
        lock = FileLock(path, poll_interval=0.2)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = _try_acquire(lock)
            if wait and not held:
                logger.info("Waiting for another process, which is building %s (its lock is %s).", label, path)
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
        """Delete a folder so that a reader sees it whole or not at all; the number of bytes freed."""
        if not os.path.lexists(folder):
            return 0
        size = size_of(folder)
        label = folder.name if folder.parent.name == "partial" else f"{folder.parent.name}-{folder.name}"
        target = self.path / "trash" / f"{label}.{secrets.token_hex(8)}"
        with explained(folder):
            target.parent.mkdir(exist_ok=True)
            os.rename(folder, target)
            delete(target)
        return size

    def _artifacts(self) -> list[Path]:
        kinds = [path for path in children(self.path) if path.name not in RESERVED_KINDS]
        folders = [folder for kind in kinds for folder in children(kind)]
        return [folder for folder in folders if re.fullmatch(LABEL, f"{folder.parent.name}-{folder.name}")]


def _try_acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _problem(folder: Path) -> str | None:
    """What is wrong with the artifact; None when it is sound, or gone (perhaps only just now)."""
    try:
        read_artifact(folder)
    except Damage as damage:
        return str(damage) if os.path.lexists(folder) else None
    return None


def _entry(folder: Path, partial: bool) -> Entry:
    """Raises FileNotFoundError when the folder is gone."""
    kind, _, key = (folder.name if partial else f"{folder.parent.name}-{folder.name}").rpartition("-")
    modified = folder.lstat().st_mtime
    entry = Entry(path=folder, kind=kind, key=key, state="partial", bytes=size_of(folder), modified=modified)
    if partial:
        return entry
    try:
        artifact = read_artifact(folder, deep=False)
    except Damage:
        return dataclasses.replace(entry, state="damaged")
    label = artifact.about.get("label")
    label = label if isinstance(label, str) else None
    return dataclasses.replace(entry, state="complete", sha256=artifact.sha256, bytes=artifact.bytes, label=label)
