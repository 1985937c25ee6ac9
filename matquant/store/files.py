"""Crash-safe files: atomic writes, SHA-256, sizes, and file-system errors as messages for the user."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matquant.errors import UserError


class DamageError(UserError):
    """Damage of a file or an artifact; the message is a clause without a full stop."""


class FileRecord(NamedTuple):
    """Expected content of one file.

    Attributes:
        sha256: 64 hexadecimal digits.
        size: in bytes.
    """

    sha256: str
    size: int

    @classmethod
    def parse(cls, value: Any) -> "FileRecord":
        """Parse a record from untrusted JSON.

        Raises:
            ValueError: ``value`` is not a record.
        """
        if isinstance(value, dict):
            sha256, size = value.get("sha256"), value.get("bytes")
            if type(sha256) is str and re.fullmatch("[0-9a-f]{64}", sha256) and type(size) is int and size >= 0:
                return cls(sha256, size)
        raise ValueError(f"{str(value)[:80]!r} is not the record of a file")

    def to_json(self) -> dict[str, Any]:
        """JSON form, as ``parse`` reads it."""
        return {"sha256": self.sha256, "bytes": self.size}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits; the file is read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_content(path: Path, record: FileRecord, verify: bool = True) -> None:
    """Compare a file's size with ``record``, and its SHA-256 if ``verify``. Links are followed.

    Raises:
        DamageError: the size or the hash differs.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size != record.size:
        raise DamageError(f"{path.name} has {size:,} bytes instead of {record.size:,}")
    if verify and hash_file(path) != record.sha256:
        raise DamageError(f"the bytes of {path.name} do not match their SHA-256")


def fingerprint_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each named file of ``folder``.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    fingerprints = {}
    for name in names:
        path = Path(folder) / name
        try:
            fingerprints[name] = hash_file(path)
        except OSError as error:
            raise UserError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    return fingerprints


def write_atomically(path: Path, *parts: bytes | memoryview) -> FileRecord:
    """Write the concatenated ``parts`` to ``path``, creating its folder.

    A reader finds either the old file or the complete new one, also after a power failure: the content is written under a
    temporary name, synced, and renamed. Several processes may write the same path at the same time.

    Raises:
        OSError: the disk is full, or the folder cannot be written. No temporary file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as stream:
            for part in parts:
                stream.write(part)
                digest.update(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return FileRecord(digest.hexdigest(), sum(len(part) for part in parts))


def append_line(path: Path, line: bytes) -> None:
    """Append a line durably. It starts on a new line even if a crash truncated the line before it.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with open(path, "ab") as stream:
        stream.write(b"\n" + line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of ``folder`` durable."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def translate_os_errors(path: Path, needed: int = 0, setting: str = "store.path") -> Iterator[None]:
    """Translate an OSError in the ``with`` block into a UserError about ``path``.

    Args:
        needed: bytes that are written in the block.
        setting: config setting that can name another folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            amount = f": {needed:,} bytes were needed for {path.name}" if needed else ""
            raise UserError(
                f"The disk (or your quota on it) is full at {path.parent}{amount}. Free some space and run the same command "
                "again; it resumes where it stopped."
            ) from error
        raise UserError(
            f"matquant cannot use {path}: {error.strerror or error}. Check the permissions, or set {setting} to another "
            "folder."
        ) from error


def try_writing(folder: Path, setting: str) -> None:
    """Check that a folder can be made and written, so that an output is refused before the work for it.

    The names that do not exist yet are made inside a temporary folder of the nearest existing one. Nothing remains, and other
    processes that use ``folder`` are not disturbed.

    Args:
        setting: config setting that can name another folder.

    Raises:
        UserError: the folder cannot be made or written.
    """
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    trial = existing / f".trial.{secrets.token_hex(8)}"
    with translate_os_errors(folder, setting=setting):
        try:
            write_atomically(trial / folder.relative_to(existing) / "trial", b"trial")
        finally:
            with contextlib.suppress(OSError):
                delete(trial)


def list_folder(folder: Path) -> list[Path]:
    """Sorted entries of ``folder``; an empty list if there is no such folder.

    Raises:
        UserError: the folder cannot be listed.
    """
    if not os.path.isdir(folder):
        return []
    with translate_os_errors(folder):
        return sorted(folder.iterdir())


def total_bytes(path: Path) -> int:
    """Size of a file, or of all files below a folder, in bytes. Links are not followed; files deleted meanwhile count 0."""
    below = [Path(top) / name for top, _, names in os.walk(path) for name in names]
    size = 0
    for file in below if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            size += file.lstat().st_size
    return size


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with its content. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
