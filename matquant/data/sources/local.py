"""A user's own text: plain files, JSON lines or Parquet tables of texts or of chats."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matquant.data.config import TextConfig
from matquant.data.sources.base import TextSource
from matquant.errors import UserError
from matquant.store import fingerprint_files

PLAIN = (".txt", ".md", ".py")
TABLES = (".jsonl", ".parquet")
SUFFIXES = PLAIN + TABLES

# Fields of a row that are looked for when none is named, in this order.
_FIELDS = ("text", "messages", "content")


class LocalSource(TextSource):
    """File or folder of the user. It has no splits: all of it is read."""

    name = "local"
    has_splits = False

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        return documents(self.folder(text), text.field, tokenizer)

    def folder(self, text: TextConfig) -> Path:
        """Path of the file or folder."""
        return Path(text.path or "").expanduser()

    def check(self, text: TextConfig, where: str) -> None:
        if text.path is None:
            raise UserError(f"{where}.dataset={text.dataset} needs {where}.path: a text file or a folder of them.")

    def file_hashes(self, text: TextConfig) -> list[str]:
        path = self.folder(text)
        return list(fingerprint_files(Path(), [str(file) for file in files(path)]).values()) if path.exists() else []

    def describe(self, text: TextConfig, split: str) -> str:
        return str(text.path)


def documents(path: Path, field: str | None, tokenizer: Any) -> Iterator[str]:
    """Texts of one file, or of every text file below a folder in the order of their paths; hidden files are skipped.

    Args:
        field: of a row of a table; ``text``, ``messages`` or ``content`` when None. A list of chat messages goes
            through the tokenizer's chat template.

    Raises:
        UserError: nothing there, an empty or damaged file, a field that is missing, chats without a template.
    """
    if not path.exists():
        raise UserError(f"There is no text at {path}. Give a file, or a folder of {', '.join(SUFFIXES)} files.")
    if path.is_file():
        found = False
        for text in _read(path, field, tokenizer):
            found |= bool(text.strip())
            yield text
        if not found:
            raise UserError(f"The text file {path} is empty. Give a file with text in it.")
        return
    found = False
    for file in files(path):
        for text in _read(file, field, tokenizer):
            # An empty file among others is nothing unusual (__init__.py).
            if text.strip():
                found = True
                yield text
    if not found:
        raise UserError(
            f"The folder {path} holds no text: no {', '.join(SUFFIXES)} file that is not empty was found in it."
        )


def files(path: Path) -> list[Path]:
    """The files that ``documents`` reads, in its order."""
    if path.is_file():
        return [path]
    found = []
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            found.append((relative.as_posix(), file))
    return [file for _, file in sorted(found)]


def _read(file: Path, field: str | None, tokenizer: Any) -> Iterator[str]:
    kind = file.suffix.lower()
    rows = _json_rows(file) if kind == ".jsonl" else _parquet_rows(file, field) if kind == ".parquet" else None
    if rows is None:
        yield _plain(file)
        return
    for number, row in enumerate(rows, 1):
        yield _text(row, field, tokenizer, f"{file}, row {number}")


def _plain(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text file {file} is not UTF-8: byte {error.start} cannot be decoded. Convert it to UTF-8, or remove it."
        ) from error
    except OSError as error:
        raise UserError(f"The text file {file} cannot be read: {error.strerror or error}.") from error


def _json_rows(file: Path) -> Iterator[Any]:
    for number, line in enumerate(_plain(file).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number} is no JSON: {error}. Each line must be one object.") from error


def _parquet_rows(file: Path, field: str | None) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        known = table.schema_arrow.names
        columns = [name for name in ([field] if field else _FIELDS) if name in known]
        for batch in table.iter_batches(columns=columns or None):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}. Convert or copy it again.") from error


def _text(row: Any, field: str | None, tokenizer: Any, where: str) -> str:
    names = (field,) if field else _FIELDS
    name = next((n for n in names if isinstance(row, dict) and n in row), None)
    if name is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field {' or '.join(names)}; found {found}. Name it with field=NAME.")
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} is neither a text nor a list of chat messages, but {type(value).__name__}.")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: {name} holds chat messages, but the model's tokenizer has no chat template.")
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise UserError(f"{where}: the model's chat template refuses these messages: {error}") from error
