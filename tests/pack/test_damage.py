"""Damaged checkpoints: always a sentence, never another exception, and never wrong numbers."""

import copy
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import Opened, logits, read
from safetensors.torch import load_file, save_file

from matquant.errors import UserError
from matquant.formats.packed import NestedSpec, parse_nested_config
from matquant.formats.shard_index import INDEX
from matquant.inference import set_bits

pytestmark = pytest.mark.slow

ONE_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(packed, tmp_path / "copy")


def set_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def edit(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Replace what is at the path, or remove it for ``...``."""
    for key in path[:-1]:
        tree = tree[key]
    if value is ...:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def unless_refused(call: Callable[[], Any]) -> Any:
    """Result of the call, or None if it raises UserError."""
    try:
        return call()
    except UserError as error:
        sentence = str(error)
    assert sentence.endswith(".")
    return None


@ONE_FOLDER
@given(data=st.data())
def test_a_damaged_description_is_refused_or_means_the_same(llama: Opened, packed: Path, data: st.DataObject) -> None:
    content = json.loads((packed / "config.json").read_text())["quantization_config"]
    whole = parse_nested_config(content)
    damaged = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        edit(damaged, data.draw(st.sampled_from(places(damaged))), data.draw(JSON | st.just(...)))
    found = unless_refused(lambda: parse_nested_config(damaged))
    if found is None:
        return
    assert (found.layers, found.max_bits, found.files) == (whole.layers, whole.max_bits, whole.files)
    assert all(2 <= found.bits_of(name) <= 8 for name in found.layers)


@settings(ONE_FOLDER, max_examples=25)
@given(data=st.data())
def test_a_flipped_or_lost_byte_is_noticed(packed: Path, folder: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(packed.glob("*.safetensors"))))
    content = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[where] ^= data.draw(st.integers(1, 255))
    else:
        del content[where:]
    (folder / file.name).write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} (do not match their SHA-256|has [0-9,]+ bytes instead of)"):
        read(folder)
    shutil.copyfile(file, folder / file.name)


@settings(ONE_FOLDER, max_examples=40)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_means_the_same(
    llama: Opened, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A folder as save_pretrained writes it, without hashes."""
    folder = saved(llama, tmp_path_factory)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    edit(header, data.draw(st.sampled_from(places(header))), data.draw(JSON | st.just(...)))
    text = json.dumps(header).encode()
    try:
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        model = unless_refused(lambda: read(folder))
        if model is None:
            return
        reference = llama.in_memory()
        set_bits(reference, 8)
        assert torch.equal(logits(model), logits(reference))
    finally:
        file.write_bytes(whole)


SAVED: list[Path] = []


def saved(llama: Opened, factory: pytest.TempPathFactory) -> Path:
    if not SAVED:
        SAVED.append(factory.mktemp("saved"))
        read(llama.pack(factory.mktemp("p") / "f")).save_pretrained(SAVED[0])
    return SAVED[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../outside.safetensors", "which is no safetensors file inside the folder"),
        ("/etc/model.safetensors", "which is no safetensors file inside the folder"),
        ("..\\outside.safetensors", "which is no safetensors file inside the folder"),
        ("model-00001-of-00007.bin", "which is no safetensors file inside the folder"),
        ("model-00009-of-00007.safetensors", "is not complete: model-00009-of-00007.safetensors"),
        (7, "which is no safetensors file inside the folder"),
    ],
)
def test_an_index_that_leaves_the_folder(folder: Path, name: Any, sentence: str) -> None:
    shutil.copyfile(folder / "model-00002-of-00007.safetensors", folder.parent / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.up_proj.plane2"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        read(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    for name in (INDEX, "model.planes3.safetensors.index.json"):
        (folder / name).write_text(content)
    for asked in ({}, {"max_bits": 3}):
        with pytest.raises(UserError, match=r"is no valid JSON|is no JSON object|names no weights"):
            read(folder, **asked)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a file, whose hash is then the right one."""
    file = next(f for f in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})

    def reseal(content: dict[str, Any]) -> None:
        spec = parse_nested_config(content)
        again = {f.name: getattr(spec, f.name) for f in spec.__dataclass_fields__.values()} | {"files": {}}
        content.update(NestedSpec(**again).to_json())

    set_config(folder, reseal)


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(f"{LAYER}.plane1"), f"lacks 1 tensors that the model needs: {LAYER}.plane1"),
        (lambda t: t.pop(f"{LAYER}.scales"), f"lacks 1 tensors that the model needs: {LAYER}.scales"),
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors that the model needs: model.norm.weight"),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(2)}), f"that the model does not have: {LAYER}.weight"),
        (lambda t: t.update({"a.plane0": torch.ones(2)}), "that the model does not have: a.plane0"),
        (lambda t: t.update({f"{LAYER}.plane1": torch.ones(2, dtype=torch.int32)}), f"{LAYER}.plane1 is I32"),
        (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}), f"{LAYER}.scales is F32"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is F32 \[3\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "the model needs float32"),
    ],
)
def test_tensors_that_are_missing_foreign_or_of_another_kind(folder: Path, change: Any, sentence: str) -> None:
    rewrite(folder, change)
    with pytest.raises(UserError, match=sentence):
        read(folder)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"bits": 9}, "bits: a bit-width must be a whole number in 2..8; found 9"),
        ({"bits": 4, "max_bits": 3}, "bits: 4 bits cannot be read; .* at most 3 bits"),
        ({"bits": {LAYER: 1}}, f"bits of {LAYER}: a bit-width must be a whole number"),
        ({"bits": {"model.head": 4}}, "no nested layers of this model: model.head. The name closest"),
        ({"bits": "none.yaml"}, "There is no allocation at none.yaml"),
        ({"bits": 3.5}, "found 3.5"),
        ({"prefill_bits": 1}, "prefill_bits: a bit-width must be a whole number"),
        ({"max_bits": 1}, "max_bits: a bit-width must be a whole number"),
        ({"device_map": {"": "disk"}}, "cannot be offloaded to disk"),
    ],
)
def test_wrong_arguments(packed: Path, asked: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(packed, **asked)


def test_another_version_and_another_model(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(UserError, match=r"is \[64, 64\] in the checkpoint and \[64, 128\] in the model"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"model.layers.1\S+, but LlamaForCausalLM has none of that name"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    set_config(folder, lambda content: content.update(format_version=3))
    with pytest.raises(UserError, match="format_version 3 is not known"):
        read(folder)
    set_config(folder, lambda content: content.update(format_version=1, offset=math.pi))
    with pytest.raises(UserError, match="does not match its seal"):
        read(folder)


def test_transformers_without_this_package_refuses_instead_of_inventing_weights(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "matquant")
    with pytest.raises(ValueError, match="import_matquant_first"):
        read(packed)
