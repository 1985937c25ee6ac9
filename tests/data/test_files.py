"""Files of a user's own text: every kind that is understood, and sentences for all others and for damaged ones."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from matquant.data import texts
from matquant.data.config import TextConfig
from matquant.data.sources import local
from matquant.data.text_files import kind_of
from matquant.errors import UserError

ROWS = [
    {"n": "1", "text": 'one, "two"\nthree'},
    {"n": "2", "text": "four\u2028five\u0085six\x0b"},
    {"n": "3", "text": "7"},
]
EXPECTED = [row["text"] for row in ROWS]


class Chats:
    """Tokenizer with a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict], tokenize: bool) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def documents(path: Path, field: str | None = None, tokenizer: Any = None) -> list[str]:
    return list(local.documents(path, field, tokenizer))


def json_lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def separated(rows: list[dict], delimiter: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def arrow(rows: list[dict], make: Any) -> bytes:
    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with make(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return buffer.getvalue()


TABLES = {
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "texts.json": json.dumps(EXPECTED).encode(),
    "lines.json": json_lines(ROWS),
    "columns.json": json.dumps(columns(ROWS), indent=1).encode(),
    "one_line_of_columns.json": json.dumps(columns(ROWS)).encode(),
    "lines.jsonl": json_lines(ROWS),
    "array.jsonl": json.dumps(ROWS).encode(),
    "windows.JSONL": json_lines(ROWS).replace(b"\n", b"\r\n"),
    "blank.ndjson": b"\n" + json_lines(ROWS).replace(b"\n", b"\n\n"),
    "a.csv": separated(ROWS, ","),
    "a.tsv": b"\xef\xbb\xbf" + separated(ROWS, "\t"),
    "a.parquet": parquet(ROWS),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
    "stream.arrow": arrow(ROWS, pyarrow.ipc.new_stream),
    "a.jsonl.gz": gzip.compress(json_lines(ROWS)),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv.xz": lzma.compress(separated(ROWS, ",")),
    "a.jsonl.zst": pyarrow.compress(json_lines(ROWS), "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_every_kind_of_table(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(TABLES[name])
    assert documents(file) == EXPECTED
    if name != "texts.json":
        assert documents(file, "n") == ["1", "2", "3"]
        with pytest.raises(UserError, match=r"row 1 has no field body; found n, text|row 1 has no field body; found"):
            documents(file, "body")


def test_json_agrees_with_the_library_datasets(tmp_path: Path) -> None:
    import datasets

    for name in ("array.json", "lines.json", "lines.jsonl", "array.jsonl", "a.csv", "a.tsv", "a.parquet"):
        file = tmp_path / name
        file.write_bytes(TABLES[name])
        kind = "parquet" if name == "a.parquet" else "csv" if name in ("a.csv", "a.tsv") else "json"
        settings: dict[str, Any] = {"sep": "\t"} if name == "a.tsv" else {}
        table = datasets.load_dataset(
            kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"), **settings
        )
        assert documents(file) == table["text"][:]


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl", "a.parquet"])
def test_chats_in_tables(name: str, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "user", "content": "you"}]}]
    content = {"array.json": json.dumps(rows).encode(), "lines.jsonl": json_lines(rows), "a.parquet": parquet(rows)}
    file = tmp_path / name
    file.write_bytes(content[name])
    assert documents(file, tokenizer=Chats()) == ["<user>hi", "<user>you"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2 is no JSON"),
        ("a.json", b'{"text": "a"', r"a\.json is no JSON.*one object on each line, an array"),
        ("a.json", b"[1, 2", r"a\.json is no JSON"),
        ("a.json", b'[{"text": "a"}, 5]', r"row 2 has no field text or messages or content; found int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8: byte 10"),
        ("a.csv", b"n,text\n1,a\n2,b,c\n", r"a\.csv, row 2 has 3 cells, but the header 2"),
        ("a.csv", b'n,text\n1,"a\n', r"a\.csv cannot be read as Csv: unexpected end of data"),
        ("a.tsv", b"n\ttext\n1\t\xff\n", r"a\.tsv is not UTF-8: byte 9"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 not really", r"a\.arrow cannot be read as Arrow"),
        ("a.jsonl.gz", b"nonsense", r"a\.jsonl\.gz cannot be read as Jsonl"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"a\.txt\.xz cannot be read as Txt"),
        ("a.txt.zst", b"nonsense", r"a\.txt\.zst cannot be read"),
        ("a.json", b"", r"a\.json is empty"),
        ("a.csv", b"text\n", r"a\.csv is empty"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(tmp_path / name)


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not UTF-8"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.docx", "a.log", "README", "a.pkl.gz", "a.parquet.gz", "a.gz", ".jsonl"])
def test_a_file_that_is_not_understood_is_refused_with_what_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text")
    text = TextConfig(dataset="local", path=str(tmp_path / name))
    for act in (lambda: documents(tmp_path / name), lambda: texts.check_text(text, "calibration")):
        with pytest.raises(UserError, match=r"kind that is not understood.*\.txt, \.md, \.py .*\.json, \.jsonl.*\.gz"):
            act()


def test_kinds() -> None:
    names = ("a.b.TXT", "a.txt.gz", "a.json.gz", "a.csv.zst", "a.arrow", "a.tar.gz", "a")
    assert [kind_of(Path(name)) for name in names] == [".txt", ".txt", ".json", ".csv", ".arrow", None, None]


@pytest.mark.parametrize("escape", ["\\ud83d", "\\udc00x"])
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "ok"}\n{"text": "a%s"}'), ("a.json", '["ok", "a%s"]')]
)
def test_half_a_character_is_named_with_its_row(name: str, content: str, escape: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content % escape)
    with pytest.raises(UserError, match=rf"{name}, row 2 holds half a character \(\\u.*lone surrogate\) at position 1"):
        documents(tmp_path / name)


def test_half_a_character_in_a_chat(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "\\udfff"}]}')
    with pytest.raises(UserError, match=r"a\.jsonl, row 1 holds half a character"):
        documents(tmp_path / "a.jsonl", tokenizer=Chats())


def test_a_whole_character_in_two_escapes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert documents(tmp_path / "a.jsonl") == ["\U0001f600"]


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(UserError, match="field=body is the column of a table, but .*plain text"):
            documents(path, "body")
    (tmp_path / "b.jsonl").write_text('{"body": "row"}')
    assert documents(tmp_path, "body") == ["text", "row"]


@pytest.mark.parametrize("setting", ["path", "field"])
@pytest.mark.parametrize("dataset", ["stdlib", "c4"])
def test_settings_that_another_text_ignores_are_refused(setting: str, dataset: str) -> None:
    text = TextConfig(dataset=dataset, **{setting: "x"})
    with pytest.raises(
        UserError, match=rf"calibration\.{setting}=x is for a text of your own.*dataset={dataset} reads"
    ):
        texts.check_text(text, "calibration")


def test_a_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.json").write_text('["row"]')
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"text": {}}}, indent=2))
    (tmp_path / "package.json").write_text('{"name": "x", "files": ["a", "b"]}')
    for name in ("c.docx", "d.pdf", "e.pdf", ".hidden.pdf", "LICENSE"):
        (tmp_path / name).write_text("?")
    assert documents(tmp_path) == ["text", "row"]
    (note,) = texts.notes(TextConfig(dataset="local", path=str(tmp_path)))
    assert "6 files in" in note
    for part in ("2 with .pdf", "1 with .docx", "1 with no suffix", "2 with .json"):
        assert part in note
    assert texts.notes(TextConfig(dataset="local", path=str(tmp_path / "a.txt"))) == []
    assert texts.notes(TextConfig(dataset="stdlib")) == []


def test_a_table_without_the_field_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.json").write_text('[{"body": "row"}]')
    with pytest.raises(UserError, match=r"b\.json, row 1 has no field text or messages or content; found body"):
        documents(tmp_path)


def test_the_kind_of_a_file_is_part_of_what_is_stored(tmp_path: Path) -> None:
    hashes = []
    for name in ("a.txt", "a.json"):
        (tmp_path / name).write_text('["row"]')
        hashes.append(local.LocalSource().file_hashes(TextConfig(dataset="local", path=str(tmp_path / name))))
    assert hashes[0] != hashes[1]
