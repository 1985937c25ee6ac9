"""Damaged and hostile artifacts are detected, reported and rebuilt."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
from store_builds import BLOCKS, INPUTS, Builder, digest_of, flip_byte

from matquant.store import Store


def edit_manifest(**changes):
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        for field, value in changes.items():
            manifest[field] = value(manifest[field]) if callable(value) else value
        seal = {field: value for field, value in manifest.items() if field != "seal"}
        manifest["seal"] = hashlib.sha256(json.dumps(seal, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def hostile_name(name):
    """Replace the manifest by a consistent one that lists a file outside the folder of the artifact."""

    def edit(folder: Path) -> None:
        secret = folder.parent / "secret"
        secret.write_bytes(b"secret")
        digest = hashlib.sha256(b"secret").hexdigest()
        files = {name.format(folder=folder): {"sha256": digest, "bytes": 6}}
        hashes = json.dumps(dict.fromkeys(files, digest), separators=(",", ":"))
        edit_manifest(files=files, sha256=hashlib.sha256(hashes.encode()).hexdigest())(folder)

    return edit


def link_out(folder: Path) -> None:
    (folder / "layers.json").rename(folder.parent / "elsewhere.json")
    (folder / "layers.json").symlink_to(folder.parent / "elsewhere.json")


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.parent / "moved")
    folder.symlink_to(folder.parent / "moved")


DAMAGE = {
    "a flipped byte": (lambda folder: flip_byte(folder / "block_1.safetensors"), "block_1.safetensors do not match"),
    "a truncated file": (
        lambda folder: os.truncate(folder / "block_1.safetensors", 9),
        "block_1.safetensors has 9 bytes",
    ),
    "a missing file": (lambda folder: (folder / "layers.json").unlink(), "layers.json is missing"),
    "a link": (link_out, "layers.json is a link"),
    "a linked folder": (replace_by_link, "is a link"),
    "a pipe": (lambda folder: ((folder / "layers.json").unlink(), os.mkfifo(folder / "layers.json")), "layers.json is"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json is unreadable"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"), "manifest.json is unreadable"),
    "deep JSON": (lambda folder: (folder / "manifest.json").write_bytes(b"[" * 200_000), "manifest.json is unreadable"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "not a JSON object"),
    "an edited fact": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace("toy parent", "toy Parent")
        ),
        "seal",
    ),
    "other inputs": (edit_manifest(inputs={}), "do not belong"),
    "another format": (edit_manifest(format=2), "do not belong"),
    "format true": (edit_manifest(format=True), "'format'"),
    "files of a wrong type": (edit_manifest(files=[]), "'files'"),
    "a null record": (edit_manifest(files={"x": None}), "not the record of a file"),
    "a negative size": (edit_manifest(files={"x": {"sha256": "0" * 64, "bytes": -1}}), "not the record of a file"),
    "an infinite fact": (edit_manifest(about={"x": float("inf")}), "manifest.json is unreadable"),
    "a wrong sum": (edit_manifest(sha256="0" * 64), "sha256"),
    "a name with ..": (hostile_name("../secret"), "plain file name"),
    "an absolute name": (hostile_name("{folder}/../secret"), "plain file name"),
}


@pytest.mark.parametrize(("harm", "problem"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_reported_and_rebuilt(store: Store, caplog: pytest.LogCaptureFixture, harm, problem: str) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    before = digest_of(built.path)
    harm(built.path)
    ((path, found),) = store.verify()
    assert path == built.path
    assert problem in found
    builder = Builder()
    mended = store.open_or_build("parent", INPUTS, builder)
    assert (mended.reused, mended.sha256, builder.made) == (False, built.sha256, list(range(BLOCKS)))
    assert digest_of(mended.path) == before
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [record.getMessage()] == mended.notes
    assert str(built.path) in mended.notes[0]
    assert problem in mended.notes[0]
    assert store.verify() == []
    assert store.open_or_build("parent", INPUTS, builder).notes == []
