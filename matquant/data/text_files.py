"""Files of text: the kinds that are understood, decompression, and sentences for damaged ones."""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from matquant.errors import UserError

PLAIN = (".txt", ".md", ".py")
ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")  # tables as text
COLUMNS = (".parquet", ".arrow")  # tables in binary columns
TABLES = ROWS + COLUMNS


def _open_zstandard(file: Path, _mode: str) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_COMPRESSED: dict[str, Callable[[Path, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}

UNDERSTOOD = (
    f"{', '.join(PLAIN)} for plain text and {', '.join(TABLES)} for tables; all but {' and '.join(COLUMNS)} may be "
    f"compressed ({', '.join(_COMPRESSED)})"
)


def kind_of(file: Path) -> str | None:
    """Suffix that determines how a file is read, one of ``PLAIN`` or ``TABLES``; None if it is not understood."""
    *before, suffix = ["", *(part.lower() for part in file.suffixes)]
    if suffix in _COMPRESSED and before:
        inner = before[-1]
        return inner if inner in PLAIN + ROWS else None
    return suffix if suffix in PLAIN + TABLES else None


@contextlib.contextmanager
def open_text_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: the file cannot be read, is damaged or is not UTF-8; also for what the ``with`` block raises.
    """
    opener = _COMPRESSED.get(file.suffix.lower(), open)
    with explain_damage(file), opener(file, "rb") as stream:
        yield stream


@contextlib.contextmanager
def explain_damage(file: Path) -> Iterator[None]:
    """Translate errors of reading a file into a UserError that names it."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text file {file} is not UTF-8: byte {error.start} cannot be decoded. Convert it to UTF-8, or remove it."
        ) from error
    except (csv.Error, pyarrow.ArrowException, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        kind, reason = (kind_of(file) or file.suffix).removeprefix("."), str(error).rstrip(".")
        raise UserError(f"{file} cannot be read as {kind.capitalize()}: {reason}. Convert or copy it again.") from error
    except OSError as error:
        raise UserError(f"The text file {file} cannot be read: {error.strerror or error}.") from error


def read_plain(file: Path) -> str:
    """Text of a plain file, UTF-8 with or without a byte order mark; line ends become LF. Raises UserError."""
    with open_text_file(file) as stream:
        return io.TextIOWrapper(stream, encoding="utf-8-sig").read()
