"""A user's own text: plain files, and tables of texts or of chats."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matquant.data.config import TextConfig
from matquant.data.sources.base import TextSource, check_characters
from matquant.data.tables import is_table, read_rows
from matquant.data.text_files import PLAIN, UNDERSTOOD, kind_of, read_plain
from matquant.errors import UserError, shorten
from matquant.store import fingerprint_files

# Fields of a row that are looked for when none is named, in this order.
_FIELDS = ("text", "messages", "content")


class LocalSource(TextSource):
    """File or folder of the user. It has no splits: all of it is read."""

    name = "local"
    has_splits = False
    reads_files = True

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        return documents(self.folder(text), text.field, tokenizer)

    def folder(self, text: TextConfig) -> Path:
        """Path of the file or folder."""
        return Path(text.path or "").expanduser()

    def check(self, text: TextConfig, where: str) -> None:
        if text.path is None:
            raise UserError(f"{where}.dataset={text.dataset} needs {where}.path: a text file or a folder of them.")
        if (path := self.folder(text)).is_file():
            _check_kind(path, text.field)

    def file_hashes(self, text: TextConfig) -> list[str]:
        path = self.folder(text)
        if not path.exists():
            return []
        found = files(path, text.field)
        hashes = fingerprint_files(Path(), [str(file) for file in found]).values()
        # The same bytes are another text in a file of another kind.
        return [f"{digest}{kind_of(file)}" for file, digest in zip(found, hashes, strict=True)]

    def notes(self, text: TextConfig) -> list[str]:
        path = self.folder(text)
        if not path.is_dir():
            return []
        read = set(files(path, text.field))
        skipped = Counter(file.suffix.lower() or "no suffix" for file in _visible_files(path) if file not in read)
        if not skipped:
            return []
        counts = shorten([f"{count} with {suffix}" for suffix, count in skipped.most_common()], 8)
        return [f"{sum(skipped.values())} files in {path} are no text that is understood, and were not read: {counts}."]

    def describe(self, text: TextConfig, split: str) -> str:
        return str(text.path)


def documents(path: Path, field: str | None, tokenizer: Any) -> Iterator[str]:
    """Texts of one file, or of every text file below a folder in the order of their paths; hidden files are skipped.

    Args:
        field: of a row of a table; ``text``, ``messages`` or ``content`` when None. A list of chat messages goes
            through the tokenizer's chat template.

    Raises:
        UserError: nothing there, a file of a kind that is not understood, an empty or damaged file, a field that is
            missing, chats without a template, a lone surrogate.
    """
    if not path.exists():
        raise UserError(f"There is no text at {path}. Give a file, or a folder of files: {UNDERSTOOD}.")
    if path.is_file():
        _check_kind(path, field)
    found = False
    for file in files(path, field):
        for text in _read(file, field, tokenizer):
            # An empty file among others is nothing unusual (__init__.py).
            if text.strip() or path.is_file():
                found |= bool(text.strip())
                yield text
    if found:
        return
    if path.is_file():
        raise UserError(f"The text file {path} is empty. Give a file with text in it.")
    raise UserError(f"The folder {path} holds no text: no file that is not empty was found in it, of {UNDERSTOOD}.")


def files(path: Path, field: str | None = None) -> list[Path]:
    """The files that ``documents`` reads, in its order."""
    if path.is_file():
        return [path]
    found = [file for file in _visible_files(path) if kind_of(file) and is_table(file, _fields(field))]
    if field is not None and found and all(kind_of(file) in PLAIN for file in found):
        raise UserError(f"field={field} is the column of a table, but the folder {path} holds plain text only.")
    return found


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder by their relative path, without hidden ones."""
    found = []
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.append((relative.as_posix(), file))
    return [file for _, file in sorted(found)]


def _check_kind(file: Path, field: str | None) -> None:
    """Raise UserError for a file that is not understood, or a field of plain text."""
    kind = kind_of(file)
    if kind is None:
        raise UserError(
            f"The text file {file} is of a kind that is not understood ({file.suffix or 'no suffix'}). Convert or rename it: "
            f"{UNDERSTOOD}."
        )
    if kind in PLAIN and field is not None:
        raise UserError(f"field={field} is the column of a table, but {file} is plain text. Leave field out.")


def _fields(field: str | None) -> Sequence[str]:
    return _FIELDS if field is None else (field,)


def _read(file: Path, field: str | None, tokenizer: Any) -> Iterator[str]:
    if kind_of(file) in PLAIN:
        yield read_plain(file)
        return
    for number, row in enumerate(read_rows(file, _fields(field)), 1):
        text = _text(row, field, tokenizer, where := f"{file}, row {number}")
        check_characters(text, where)
        yield text


def _text(row: Any, field: str | None, tokenizer: Any, where: str) -> str:
    names = _fields(field)
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
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    except Exception as error:  # templates raise errors of any class
        raise UserError(f"{where}: the model's chat template refuses these messages: {error}") from error
