"""Artifacts are shared: equal inputs give one artifact, with the same bytes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builds import BLOCKS, INPUTS, Builder, block, digest_of

from matquant.store import Draft, Store, fingerprint_files


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


def test_the_manifest_records_kind_inputs_tools_and_hashes(store: Store) -> None:
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


def test_tensor_files_do_not_depend_on_insertion_order(store: Store) -> None:
    metadata = {f"key{index}": "é" * index for index in range(12)}
    tensors = {"b": torch.ones(3), "a": torch.arange(6.0).reshape(2, 3).T, "c": torch.zeros(2, dtype=torch.float16)}
    hashes = set()
    for number in range(3):  # safetensors itself orders metadata differently in each call
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
        raw = data.draw(st.binary(min_size=count, max_size=count))  # includes all NaN patterns
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
