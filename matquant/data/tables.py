"""Rows of tables of text: JSON (lines, an array or columns), CSV, TSV, Parquet and Arrow, as ``datasets`` reads them."""

import csv
import io
import itertools
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from matquant.data.text_files import explain_damage, kind_of, open_text_file
from matquant.errors import UserError

_JSON = (".json", ".jsonl", ".ndjson")
_CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_CSV_FIELD = 2**31 - 1  # characters


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a table, as mappings from column to value.

    Args:
        file: of a kind in ``text_files.TABLES``.
        columns: that are read where the format reads columns one by one; all if the table has none of them.

    Raises:
        UserError: the file is damaged or not of its kind.
    """
    kind = kind_of(file)
    if kind in _JSON:
        with open_text_file(file) as stream:
            yield from _json_rows(file, stream)
    elif kind in _CSV_DELIMITERS:
        yield from _csv_rows(file, _CSV_DELIMITERS[kind])
    else:
        with explain_damage(file):
            yield from _column_rows(file, kind, columns)


def is_table(file: Path, columns: Sequence[str]) -> bool:
    """Return False for a .json file that is a single object without one of ``columns``, such as settings of a program.

    Raises:
        UserError: the file is damaged or not of its kind.
    """
    if kind_of(file) != ".json":
        return True
    with open_text_file(file) as stream:
        if stream.read(64).removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            return True
    first = list(itertools.islice(read_rows(file, columns), 2))
    return len(first) > 1 or any(isinstance(row, dict) and not row.keys().isdisjoint(columns) for row in first)


def _json_rows(file: Path, stream: BinaryIO) -> Iterator[Any]:
    """Rows of JSON lines, of an array of objects or texts, or (of a .json file) of one object."""
    lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    number, first = next(lines, (1, b""))
    first = first.removeprefix(BOM_UTF8)
    if not first.strip():
        return
    if first.lstrip().startswith(b"["):
        yield from _array_rows(_parse(first + stream.read(), str(file)))
        return
    try:
        row = _parse(first, f"{file}, line {number}")
    except UserError:
        if kind_of(file) != ".json":
            raise
        row = _parse(first + stream.read(), str(file))
    second = next(lines, None)
    if second is None and kind_of(file) == ".json":
        yield from _object_rows(row)
        return
    yield row
    for number, line in [] if second is None else itertools.chain([second], lines):
        yield _parse(line, f"{file}, line {number}")


def _parse(content: bytes, where: str) -> Any:
    """Value of a JSON text. Raises UserError."""
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {error.start} cannot be decoded. Convert it to UTF-8, or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is no JSON: {error}. A table is one object on each line, an array of objects or texts, or one object "
            "of columns."
        ) from error


def _array_rows(array: Iterable[Any]) -> Iterator[Any]:
    for element in array:
        yield {"text": element} if isinstance(element, str) else element


def _object_rows(row: Any) -> Iterator[Any]:
    """Rows of an object whose values are equally long lists of texts or of chats; any other object is one row."""
    columns = list(row.values()) if isinstance(row, dict) else []
    is_columns = (
        bool(columns)
        and all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns}) == 1
        and not any(isinstance(element, dict) for column in columns for element in column)
    )
    if not is_columns:
        yield row
        return
    for values in zip(*columns, strict=True):
        yield dict(zip(row, values, strict=True))


def _csv_rows(file: Path, delimiter: str) -> Iterator[dict[str, str]]:
    """Rows of a table with a header. All values are texts."""
    with open_text_file(file) as stream:
        csv.field_size_limit(_MAX_CSV_FIELD)
        content = io.StringIO(stream.read().decode("utf-8-sig"), newline="")
        lines = (line for line in csv.reader(content, delimiter=delimiter, strict=True) if line)
        header = next(lines, [])
        for number, line in enumerate(lines, 1):
            if len(line) != len(header):
                raise UserError(
                    f"{file}, row {number} has {len(line)} cells, but the header {len(header)}. A cell with a delimiter or a "
                    "line break needs quotes."
                )
            yield dict(zip(header, line, strict=True))


def _column_rows(file: Path, kind: str | None, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet

    if kind == ".parquet":
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [name for name in columns if name in table.schema_arrow.names]
        batches: Iterable[Any] = table.iter_batches(columns=wanted or None)
    else:
        wanted, batches = list(columns), _arrow_batches(file)
    for batch in batches:
        kept = [name for name in wanted if name in batch.schema.names]
        yield from (batch.select(kept) if kept else batch).to_pylist()


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Record batches of an Arrow file, or of an Arrow stream, as ``datasets`` caches them."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
