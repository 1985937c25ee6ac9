"""The commands ls, verify and clean."""

import time

import pytest
from store_builds import INPUTS, Builder, Interrupted, flip_byte, interrupted_after

from matquant.store import Draft, Store


def test_ls_shows_complete_partial_and_damaged(store: Store) -> None:
    assert (store.ls(), store.verify(), store.clean()) == ([], [], 0)
    built = store.open_or_build("parent", INPUTS, Builder())
    broken = store.open_or_build("search", INPUTS, Builder())
    (broken.path / "layers.json").unlink()
    with pytest.raises(Interrupted):
        store.open_or_build("parent", {}, interrupted_after(1))
    entries = {(entry.kind, entry.state): entry for entry in store.ls()}
    assert entries.keys() == {("parent", "complete"), ("parent", "partial"), ("search", "damaged")}
    complete, partial = entries["parent", "complete"], entries["parent", "partial"]
    assert (complete.sha256, complete.bytes, complete.label) == (built.sha256, built.bytes, "toy parent")
    assert complete.path == built.path
    assert (partial.sha256, partial.label) == (None, None)
    assert partial.bytes > 0
    assert abs(partial.modified - time.time()) < 60


def test_clean_removes_drafts_damaged_artifacts_and_leftovers(store: Store) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    broken = store.open_or_build("search", INPUTS, Builder())
    flip_byte(broken.path / "layers.json")
    with pytest.raises(Interrupted):
        store.open_or_build("parent", {}, interrupted_after(1))
    leftover = store.path / "trash" / f"parent-{'0' * 24}.{'0' * 16}"
    leftover.mkdir(parents=True)
    (leftover / "x").write_bytes(b"12345")
    own = [store.path / "trash" / "mine", store.path / "notes" / "mine", store.path / "partial" / "mine"]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    expected = sum(path.stat().st_size for path in [*broken.path.iterdir(), *store.path.glob("partial/*/*")]) + 5
    assert store.clean() == expected
    assert [entry.path for entry in store.ls()] == [built.path]
    assert list((store.path / "locks").iterdir()) == []
    assert store.open_or_build("parent", INPUTS, Builder()).reused
    expected = sum(path.stat().st_size for path in built.path.iterdir())
    assert store.clean(everything=True) == expected
    assert store.ls() == []
    assert all(path.exists() for path in own)


@pytest.mark.parametrize("everything", [False, True])
def test_clean_keeps_a_running_build(store: Store, everything: bool) -> None:
    def build(draft: Draft) -> dict[str, object]:
        draft.write_json("x.json", 1)
        assert store.clean(everything) == 0
        assert draft.has("x.json")
        return {}

    assert store.open_or_build("parent", INPUTS, build).names() == ["x.json"]
