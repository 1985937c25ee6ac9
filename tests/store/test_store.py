"""The store, through its public API: sharing, crashes, damage, hostile content, housekeeping."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.errors import UserError
from matquant.store import Draft, Store, fingerprint_files

BLOCKS = 4
INPUTS = {"model": "toy", "bits": [2, 4, 8]}


def block(index: int) -> dict[str, torch.Tensor]:
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6) + index
    return {"codes": codes, "scales": torch.full((4, 1), 0.5 + index, dtype=torch.bfloat16)}


class Builder:
    """A build of ``BLOCKS`` blocks that remembers which ones it had to make."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.resumed = False
        self.draft: Draft | None = None

    def __call__(self, draft: Draft) -> dict[str, object]:
        self.draft, self.resumed = draft, draft.resumed
        for index in range(BLOCKS):
            name = f"block_{index}.safetensors"
            if not draft.has(name):
                self.made.append(index)
                draft.write_tensors(name, block(index), {"index": str(index), "slicing": "msb", "about": "ü"})
        draft.write_json("layers.json", {"layers": BLOCKS})
        return {"label": "toy parent", "blocks": BLOCKS}


class Interrupted(Exception):
    pass


def interrupted_after(blocks: int, then=lambda draft: None):
    """A build that dies after some blocks, as by Ctrl-C."""

    def build(draft: Draft) -> dict[str, object]:
        for index in range(blocks):
            draft.write_tensors(
                f"block_{index}.safetensors", block(index), {"index": str(index), "slicing": "msb", "about": "ü"}
            )
        then(draft)
        raise Interrupted

    return build


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def flip_byte(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def digest_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# Sharing


def test_same_inputs_share_one_build(store: Store) -> None:
    first, second = Builder(), Builder()
    built = store.open_or_build("parent", INPUTS, first)
    found = store.open_or_build("parent", {"bits": (2, 4, 8), "model": "toy"}, second)
    assert (built.reused, found.reused) == (False, True)
    assert first.made == list(range(BLOCKS))
    assert second.draft is None
    assert (found.path, found.sha256, found.about, found.inputs) == (built.path, built.sha256, built.about, INPUTS)
    assert built.path == store.path / "parent" / built.key
    assert built.names() == [f"block_{i}.safetensors" for i in range(BLOCKS)] + ["layers.json"]
    assert built.bytes == sum((built.path / name).stat().st_size for name in built.names())
    assert sorted(path.name for path in built.path.iterdir()) == [*built.names(), "manifest.json"]
    assert found.read_json("layers.json") == {"layers": BLOCKS}
    tensors, metadata = found.read_tensors("block_2.safetensors")
    assert metadata["index"] == "2"
    assert all(torch.equal(tensors[name], tensor) for name, tensor in block(2).items())


def test_the_manifest_says_what_it_is_and_where_it_is_from(store: Store) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    manifest = json.loads((built.path / "manifest.json").read_text())
    assert (manifest["kind"], manifest["format"], manifest["inputs"]) == ("parent", 1, INPUTS)
    assert {"matquant", "torch", "safetensors"} <= manifest["tools"].keys()
    assert manifest["files"]["layers.json"]["bytes"] == (built.path / "layers.json").stat().st_size
    hashes = {name: record["sha256"] for name, record in manifest["files"].items()}
    assert hashes == fingerprint_files(built.path, built.names())
    canonical = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    assert built.sha256 == manifest["sha256"] == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(("kind", "inputs"), [("search", INPUTS), ("parent", INPUTS | {"seed": 1}), ("parent", {})])
def test_different_inputs_do_not_share(store: Store, kind: str, inputs: dict) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    other = store.open_or_build(kind, inputs, Builder())
    assert not other.reused
    assert other.key != built.key


def test_two_stores_hold_the_same_bytes(tmp_path: Path) -> None:
    one, two = (Store(tmp_path / name).open_or_build("parent", INPUTS, Builder()) for name in "ab")
    assert digest_of(one.path) == digest_of(two.path)


def test_tensor_files_do_not_depend_on_the_order_of_insertion(store: Store) -> None:
    metadata = {f"key{index}": "é" * index for index in range(12)}
    tensors = {"b": torch.ones(3), "a": torch.arange(6.0).reshape(2, 3).T, "c": torch.zeros(2, dtype=torch.float16)}
    hashes = set()
    for number in range(3):  # safetensors itself orders metadata anew in each call
        metadata, tensors = dict(reversed(metadata.items())), dict(reversed(tensors.items()))
        built = store.open_or_build("parent", {"n": number}, lambda d: d.write_tensors("x", tensors, metadata) or {})  # noqa: B023
        hashes.add(built.sha256)
    assert len(hashes) == 1


ELEMENTS = {torch.uint8: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tensors_round_trip_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensors = {}
    for dtype, width in ELEMENTS.items():
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        count = width * torch.Size(shape).numel()
        raw = data.draw(st.binary(min_size=count, max_size=count))  # every NaN pattern among them
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[f"model.{dtype}"] = flat.reshape(shape)
    metadata = data.draw(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=5)
        )
    )
    draft = Draft(tmp_path_factory.mktemp("draft"))
    draft.write_tensors("x.safetensors", tensors, metadata)
    found, found_metadata = draft.read_tensors("x.safetensors")
    assert found_metadata == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


# Several processes

SCRIPT = """
import logging, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import INPUTS, Builder, BLOCKS, block
from matquant.store import Store
logging.basicConfig(level=logging.INFO, format="%(message)s")

class Slow(Builder):
    def __call__(self, draft):
        write = draft.write_tensors
        def slow(name, *rest):
            write(name, *rest)
            print("wrote", name, flush=True)
            while not Path({go!r}).exists():
                time.sleep(0.02)
        draft.write_tensors = slow
        return super().__call__(draft)

built = Store(Path({path!r})).open_or_build("parent", INPUTS, Slow())
print("reused" if built.reused else "built", built.sha256, flush=True)
"""


def start(store: Store, go: Path) -> subprocess.Popen:
    """Another process that builds, and after each block waits until the file ``go`` is there."""
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here), path=str(store.path), go=str(go))
    environment = os.environ | {"PYTHONPATH": str(here.parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_two_processes_at_once_build_once(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path / "go")
    assert first.stdout.readline() == "wrote block_0.safetensors\n"
    second = start(store, tmp_path / "go")
    assert "Waiting for another process" in second.stderr.readline()
    (tmp_path / "go").touch()
    (built, _), (found, errors) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert [out.split()[-2] for out in (built, found)] == ["built", "reused"]
    assert built.split()[-1] == found.split()[-1]
    assert "wrote" not in found
    assert errors == ""


def test_a_killed_build_is_resumed_with_the_same_result(store: Store, tmp_path: Path) -> None:
    undisturbed = Store(tmp_path / "other").open_or_build("parent", INPUTS, Builder())
    process = start(store, tmp_path / "never")
    assert process.stdout.readline() == "wrote block_0.safetensors\n"
    assert store.clean() == 0  # its lock is held
    assert not (store.path / "parent").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()

    builder = Builder()
    began = time.monotonic()
    built = store.open_or_build("parent", INPUTS, builder)
    assert time.monotonic() - began < 5
    assert builder.resumed
    assert builder.made == [1, 2, 3]
    assert not built.reused
    assert digest_of(built.path) == digest_of(undisturbed.path)
    assert built.notes == []


# Drafts


def test_what_an_interrupted_build_left_is_used_again(store: Store) -> None:
    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(2))
    builder = Builder()
    store.open_or_build("parent", INPUTS, builder)
    assert (builder.resumed, builder.made) == (True, [2, 3])
    assert not any((store.path / "partial").iterdir())


@pytest.mark.parametrize(
    "torn", [b'{"name": "block_1.safe', b"\0" * 60, b"[" * 100_000, b"\xff\xfe", b'{"name": "../x"}', b"[1]"]
)
def test_a_torn_journal_line_costs_one_block_only(store: Store, torn: bytes) -> None:
    def tear(draft: Draft) -> None:
        journal = draft.path / ".journal"
        lines = journal.read_bytes().splitlines()
        journal.write_bytes(b"\n".join(line for line in lines if b"block_1" not in line) + b"\n" + torn)

    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(2, tear))
    with pytest.raises(Interrupted):  # appends behind the torn line
        store.open_or_build("parent", INPUTS, interrupted_after(1))
    builder = Builder()
    assert store.open_or_build("parent", INPUTS, builder).notes == []
    assert builder.made == [1, 2, 3]


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 30), flip_byte, Path.unlink])
def test_a_damaged_file_in_a_draft_is_made_again(store: Store, caplog: pytest.LogCaptureFixture, harm) -> None:
    with pytest.raises(Interrupted):
        store.open_or_build("parent", INPUTS, interrupted_after(3, lambda d: harm(d.path / "block_1.safetensors")))
    builder = Builder()
    built = store.open_or_build("parent", INPUTS, builder)
    assert builder.made == [1, 3]
    assert len(built.notes) == 1
    assert "block_1.safetensors" in built.notes[0]
    assert caplog.messages == built.notes
    assert store.verify() == []


def test_only_what_this_build_asked_for_is_committed(store: Store) -> None:
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
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    draft = Draft(tmp_path / "draft")
    for call in (lambda: draft.write_tensors(name, {}), lambda: draft.write_json(name, 1), lambda: draft.has(name)):
        with pytest.raises(ValueError, match="plain file name"):
            call()


def test_reading_what_is_not_there_is_refused(store: Store) -> None:
    built = store.open_or_build("parent", INPUTS, Builder())
    with pytest.raises(ValueError, match=r"no file 'x'.*layers\.json"):
        built.read_tensors("x")
    (built.path / "layers.json").unlink()
    with pytest.raises(UserError, match="Give the same command again"):
        built.read_json("layers.json")
    with pytest.raises(ValueError, match="no sound file"):
        Draft(store.path / "draft").read_json("x")


@pytest.mark.parametrize("kind", ["partial", "locks", "../x", "", "A"])
def test_wrong_kinds_and_inputs_are_refused_before_any_work(store: Store, kind: str) -> None:
    with pytest.raises(ValueError, match="kind of artifact"):
        store.open_or_build(kind, {}, Builder())
    with pytest.raises(ValueError, match="JSON"):
        store.open_or_build("parent", {"x": float("nan")}, Builder())
    assert not store.path.exists()


# Damage


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
    """A manifest that is right in everything, but lists a file outside its folder."""

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
def test_damage_is_named_and_mended(store: Store, caplog: pytest.LogCaptureFixture, harm, problem: str) -> None:
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


# A disk that is full, a path that cannot be used


@pytest.mark.parametrize("victim", ["block_2.safetensors", ".journal", "manifest.json"])
def test_a_full_disk_is_explained_and_the_build_resumes(
    store: Store, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    fsync = os.fsync

    def in_draft(part_of_name: str) -> set[int]:
        """The inodes of the files in the draft that are called so."""
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

    monkeypatch.setattr(Path, "mkdir", denied)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(UserError, match=r"Permission denied.*store\.path"):
        Store(tmp_path / "store").open_or_build("parent", INPUTS, Builder())


def test_a_finished_artifact_is_read_from_a_store_that_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.open_or_build("parent", INPUTS, Builder())
    monkeypatch.setattr("matquant.store.store.FileLock", None)
    assert store.open_or_build("parent", INPUTS, Builder()).reused


# Housekeeping


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


def test_clean_removes_what_nobody_needs(store: Store) -> None:
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
def test_clean_leaves_a_build_alone_that_is_under_way(store: Store, everything: bool) -> None:
    def build(draft: Draft) -> dict[str, object]:
        draft.write_json("x.json", 1)
        assert store.clean(everything) == 0
        assert draft.has("x.json")
        return {}

    assert store.open_or_build("parent", INPUTS, build).names() == ["x.json"]


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    assert fingerprint_files(tmp_path, ["config.json"]) == {"config.json": hashlib.sha256(b"{}").hexdigest()}
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read"):
        fingerprint_files(tmp_path, ["weights.safetensors"])
