"""Errors of the file system: a full disk, a path that cannot be used, a store that is read-only."""

import errno
import os
from pathlib import Path

import pytest
from store_builds import INPUTS, Builder

from matquant.errors import UserError
from matquant.store import Store


@pytest.mark.parametrize("victim", ["block_2.safetensors", ".journal", "manifest.json"])
def test_a_full_disk_is_explained_and_the_build_resumes(
    store: Store, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    fsync = os.fsync

    def in_draft(part_of_name: str) -> set[int]:
        """Inodes of the files of the draft whose name contains ``part_of_name``."""
        return {path.stat().st_ino for path in store.path.glob("partial/*/*") if part_of_name in path.name}

    def full_after_block_1(descriptor: int) -> None:
        if in_draft("block_1.safetensors") and os.fstat(descriptor).st_ino in in_draft(victim):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_block_1)
        with pytest.raises(UserError, match=r"full at .*[0-9]+ bytes were needed for .*resumes") as caught:
            store.open_or_build("parent", INPUTS, Builder())
    assert victim in str(caught.value)
    assert not in_draft(".tmp")
    builder = Builder()
    built = store.open_or_build("parent", INPUTS, builder)
    assert 0 not in builder.made
    assert built.notes == []
    assert store.verify() == []


def test_a_path_that_cannot_be_used_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        Store(tmp_path / "file")
    with pytest.raises(UserError, match="cannot use"):
        Store(tmp_path / "file" / "below").open_or_build("parent", INPUTS, Builder())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # tests may run as root, which ignores file modes
    with pytest.raises(UserError, match=r"Permission denied.*store\.path"):
        Store(tmp_path / "store").open_or_build("parent", INPUTS, Builder())


def test_a_finished_artifact_is_read_from_a_store_that_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.open_or_build("parent", INPUTS, Builder())
    monkeypatch.setattr("matquant.store.store.FileLock", None)
    assert store.open_or_build("parent", INPUTS, Builder()).reused
