"""Drafts: an interrupted build is resumed, and a damaged file of a draft is built again."""

import os
from pathlib import Path

import pytest
from store_builds import INPUTS, Builder, Interrupted, flip_byte, interrupted_after

from matquant.errors import UserError
from matquant.store import Draft, Store


def test_an_interrupted_build_is_resumed_at_the_next_block(store: Store) -> None:
    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(2))
    builder = Builder()
    store.open_or_build("parent", INPUTS, builder)
    assert (builder.resumed, builder.made) == (True, [2, 3])
    assert not any((store.path / "partial").iterdir())


@pytest.mark.parametrize(
    "torn", [b'{"name": "block_1.safe', b"\0" * 60, b"[" * 100_000, b"\xff\xfe", b'{"name": "../x"}', b"[1]"]
)
def test_a_truncated_journal_line_costs_one_block_only(store: Store, torn: bytes) -> None:
    def tear(draft: Draft) -> None:
        journal = draft.path / ".journal"
        lines = journal.read_bytes().splitlines()
        journal.write_bytes(b"\n".join(line for line in lines if b"block_1" not in line) + b"\n" + torn)

    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(2, tear))
    with pytest.raises(Interrupted):  # appends after the truncated line
        store.open_or_build("parent", INPUTS, interrupted_after(1))
    builder = Builder()
    assert store.open_or_build("parent", INPUTS, builder).notes == []
    assert builder.made == [1, 2, 3]


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 30), flip_byte, Path.unlink])
def test_a_damaged_file_of_a_draft_is_built_again(store: Store, caplog: pytest.LogCaptureFixture, harm) -> None:
    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(3, lambda d: harm(d.path / "block_1.safetensors")))
    builder = Builder()
    built = store.open_or_build("parent", INPUTS, builder)
    assert builder.made == [1, 3]
    assert len(built.notes) == 1
    assert "block_1.safetensors" in built.notes[0]
    assert caplog.messages == built.notes
    assert store.verify() == []


def test_only_files_of_this_build_are_committed(store: Store) -> None:
    def stray(draft: Draft) -> None:
        draft.write_json("old.json", 1)
        (draft.path / "unknown").write_bytes(b"x")

    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(0, stray))
    built = store.open_or_build("parent", INPUTS, Builder())
    assert "old.json" not in built.names()
    assert sorted(path.name for path in built.path.iterdir()) == [*built.names(), "manifest.json"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", "", "/etc/x", "a\\b", ".hidden", "manifest.json", "a\0b", "a\n", "C:x"]
)
def test_file_names_that_are_not_plain_are_rejected(tmp_path: Path, name: str) -> None:
    draft = Draft(tmp_path / "draft")
    for call in (lambda: draft.write_tensors(name, {}), lambda: draft.write_json(name, 1), lambda: draft.has(name)):
        with pytest.raises(ValueError, match="plain file name"):
            call()


def test_reading_a_missing_file_is_rejected(store: Store) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    with pytest.raises(ValueError, match=r"no file 'x'.*layers\.json"):
        built.read_tensors("x")
    (built.path / "layers.json").unlink()
    with pytest.raises(UserError, match="layers.json cannot be read"):
        built.read_json("layers.json")
    with pytest.raises(ValueError, match="no complete file"):
        Draft(store.path / "draft").read_json("x")


@pytest.mark.parametrize("kind", ["partial", "locks", "../x", "", "A"])
def test_invalid_kinds_and_inputs_are_rejected_before_any_work(store: Store, kind: str) -> None:
    with pytest.raises(ValueError, match="kind of artifact"):
        store.open_or_build(kind, {}, Builder())
    with pytest.raises(ValueError, match="JSON"):
        store.open_or_build("parent", {"x": float("nan")}, Builder())
    assert not store.path.exists()
