"""Crash-safe files: atomic writes, hashes, and file-system errors as messages for the user."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from matquant.errors import UserError
from matquant.store import fingerprint_files, hash_file, write_atomically
from matquant.store.files import translate_os_errors


def test_an_atomic_write_creates_the_folder_and_returns_the_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.bin"
    record = write_atomically(path, b"ab", memoryview(b"c"))
    assert path.read_bytes() == b"abc"
    assert record == (hashlib.sha256(b"abc").hexdigest(), 3)
    assert hash_file(path) == record.sha256


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_atomic_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "x.bin"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints_are_hashes_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    assert fingerprint_files(tmp_path, ["config.json"]) == {"config.json": hashlib.sha256(b"{}").hexdigest()}
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read"):
        fingerprint_files(tmp_path, ["weights.safetensors"])


def test_a_translated_error_names_the_path_and_the_setting(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"missing: No such file.*pack\.path"),
        translate_os_errors(tmp_path / "missing", setting="pack.path"),
    ):
        (tmp_path / "missing").read_bytes()
