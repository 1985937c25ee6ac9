"""Files that survive a crash or say that they did not: names, hashes, atomic writes and deterministic bytes."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from matquant.errors import UserError

MANIFEST = "manifest.json"
REBUILD = "Give the same command again to rebuild it."


class Damage(UserError):
    """What is wrong with an artifact or a draft, as the end of a sentence."""


class Record(NamedTuple):
    """What the bytes of one file must be."""

    sha256: str
    size: int

    @classmethod
    def parse(cls, value: Any) -> "Record":
        """A record out of JSON that may be hostile. Raises ValueError when it is none."""
        if isinstance(value, dict):
            sha256, size = value.get("sha256"), value.get("bytes")
            if type(sha256) is str and re.fullmatch("[0-9a-f]{64}", sha256) and type(size) is int and size >= 0:
                return cls(sha256, size)
        raise ValueError(f"{str(value)[:80]!r} is not the record of a file")

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.size}


def plain_name(name: Any) -> str:
    """``name``, when it can be nothing but a file of the store's own making in its folder. Raises ValueError."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name) or name == MANIFEST:
        raise ValueError(
            f"{str(name)[:80]!r} is not a plain file name: letters, digits and ._- make one; not {MANIFEST}"
        )
    return name


def fingerprint_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each named file of ``folder``, read in pieces.

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


# JSON


def to_plain(value: Any) -> Any:
    """``value`` as it comes back from a JSON file (tuples as lists, keys as texts), so that both forms have one hash.

    Raises:
        ValueError, TypeError: it has no JSON form; NaN and infinity have none.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical form: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def pretty_json(value: Any) -> bytes:
    """The bytes of a JSON file, for people to read; the same for the same content."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Raises UserError when the file is gone or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"The file {path} cannot be read: {error}. {REBUILD}") from error


# Safetensors


def safetensors_parts(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> list[bytes | memoryview]:
    """The header and the data of a safetensors file, always the same for the same tensors and metadata."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    data_at = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_at])
    if metadata:  # safetensors sorts the tensors, but writes metadata in the order of a hash map: another in each run
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    return [len(text).to_bytes(8, "little") + text, memoryview(content)[data_at:]]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, mapped from the file as they are touched, and the metadata. Raises UserError when unreadable."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"The file {path} cannot be read: {error}. {REBUILD}") from error


# Writing, checking and deleting


def write_atomically(target: Path, parts: Sequence[bytes | memoryview]) -> Record:
    """Write the parts, so that ``target`` is all there or not at all, even after a power cut.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")  # no plain name begins with a dot
    digest, size = hashlib.sha256(), sum(len(part) for part in parts)
    try:
        with explained(target, size):
            with open(temporary, "wb") as stream:
                for part in parts:
                    stream.write(part)
                    digest.update(part)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return Record(digest.hexdigest(), size)


def append_line(path: Path, line: bytes) -> None:
    """Append a line durably. A line before it that a crash tore stays a line of its own. Raises UserError."""
    with explained(path, len(line) + 2), open(path, "ab") as stream:
        stream.write(b"\n" + line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the system's errors on ``path`` into a UserError; ``needed`` is the number of bytes being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            amount = f": {needed:,} bytes were needed for {path.name}" if needed else ""
            what = f"The disk (or your quota on it) is full at {path.parent}{amount}."
            mend = "Make room and give the same command again; it resumes where it stopped."
        else:
            what = f"The store cannot use {path}: {error.strerror or error}."
            mend = "Check that you may read and write there, or set store.path to another folder."
        raise UserError(f"{what} {mend}") from error


def check_file(path: Path, record: Record, deep: bool = True) -> None:
    """Raises Damage when the file is not there, is no ordinary file or (``deep``) has other bytes."""
    require(path, stat.S_ISREG)
    with explained(path):
        try:
            check_content(path, record, deep)
        except FileNotFoundError as error:
            raise Damage(f"{path.name} is missing") from error


def check_content(path: Path, record: Record, deep: bool = True) -> None:
    """Compare the size and, with ``deep``, the SHA-256 of a file with its record. Links are followed.

    Raises:
        Damage: the size or the hash differs.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size != record.size:
        raise Damage(f"{path.name} has {size:,} bytes instead of {record.size:,}")
    if deep and hash_file(path) != record.sha256:
        raise Damage(f"the bytes of {path.name} do not match their SHA-256")


def require(path: Path, is_wanted: Callable[[int], bool]) -> os.stat_result:
    """The status of a path that is of the wanted type itself, not through a link. Raises Damage."""
    with explained(path):
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Damage(f"{path.name} is missing") from error
    if not is_wanted(status.st_mode):
        raise Damage(f"{path.name} is a link or something else that the store never writes")
    return status


def children(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing when there is no such folder. Raises UserError when it cannot be listed."""
    if not os.path.isdir(folder):
        return []
    with explained(folder):
        return sorted(folder.iterdir())


def size_of(path: Path) -> int:
    """The bytes of a file, or of the files below a folder, links not followed; what vanishes meanwhile counts as 0."""
    below = [Path(top) / name for top, _, names in os.walk(path) for name in names]
    size = 0
    for file in below if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            size += file.lstat().st_size
    return size


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
