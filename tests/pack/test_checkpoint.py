"""Nested checkpoints: whatever a parent holds is packed, and loads in Transformers as the same model, bit for bit."""

import dataclasses
import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, make_model, save
from packing import IDS, Opened, logits, read
from transformers import AutoConfig

import matquant  # noqa: F401 - makes the format known
from matquant.errors import UserError
from matquant.formats.packed import parse_nested_config
from matquant.inference import NestedPlanes, nested_layers, set_bits
from matquant.models.blocks import BlockModel
from matquant.models.loading import load_model

pytestmark = pytest.mark.slow

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONFIGS if kind not in ("mistral", "qwen2", "gemma2", "granite", "olmo2")),
    *((kind, {}) for kind in ("llama4_text", "phimoe", "deepseek_v4")),  # routers, grouped layers: no linear layers
    ("falcon_h1", {}),  # buffers set by the parent module
    ("mamba", {}),  # a weight that is read
    ("qwen2", {"head": True}),  # tied
    ("llama", {"head": True}),
    ("qwen2", {"symmetric": False}),
    ("gpt2", {"group_size": -1}),
    ("llama", {"slicing": "round"}),
    ("opt", {"zero_point_offset": 8.0}),
    ("mixtral", {"skip": "down_proj"}),  # of each expert only a part is nested
    ("gpt2", {"skip": "c_attn"}),
    ("llama", {"scale_shares": {2: 0.6, 3: 0.8, 4: 0.9}}),
    ("mixtral", {"scale_shares": {2: 0.6}}),
    ("llama", {"stretch": 1.25, "zero_point_offset": 8.0}),
    ("mixtral", {"stretch": 1.5}),
]


def assert_same_at(widths: Any, model: Any, reference: Any) -> None:
    model.set_bits(widths)
    set_bits(reference, widths)
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_whatever_a_parent_holds_loads_as_the_same_model(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    opened = Opened(save(make_model(kind), tmp_path / "model", shard="100KB"), tmp_path / "store", **options)
    folder = opened.pack(tmp_path / "packed", widths=3)
    reference = opened.in_memory()
    model = read(folder)
    assert {layer.bits for layer in nested_layers(model).values()} == {3}
    assert set(nested_layers(model)) == set(opened.names())
    for bits in (3, 8):
        assert_same_at(bits, model, reference)
    model.set_bits(2)
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    few = read(folder, max_bits=2)
    assert torch.equal(logits(few), logits(model))
    assert max(layer.max_bits for layer in nested_layers(few).values()) == 2


SHORT_GROUPS = {  # sizes that groups of 128 do not divide
    "llama": {"hidden_size": 72, "intermediate_size": 200},
    "gpt2": {"n_embd": 200, "n_inner": 144},
    "mixtral": {"hidden_size": 200, "intermediate_size": 136},
    "qwen2": {"hidden_size": 136, "intermediate_size": 72},
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", SHORT_GROUPS)
def test_rows_with_a_short_last_group_load_as_the_same_slice(kind: str, symmetric: bool, tmp_path: Path) -> None:
    saved = save(make_model(kind, **SHORT_GROUPS[kind]), tmp_path / "model")
    opened = Opened(saved, tmp_path / "store", group_size=128, symmetric=symmetric, head=kind == "qwen2")
    assert any(spec.in_features % spec.format.group_size for spec in opened.specs().values())
    model, reference = read(opened.pack(tmp_path / "packed")), opened.in_memory()
    for bits in (2, 5, 8):
        assert_same_at(bits, model, reference)
        torch.testing.assert_close(logits(model), logits(dense_slice(opened, bits)), rtol=1e-4, atol=1e-4)
    model.set_bits(3)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again")), logits(model))


def dense_slice(opened: Opened, bits: int) -> Any:
    """The model with the dense weights of a slice, without nested layers."""
    model = load_model(opened.config).model.float()
    BlockModel(model)
    if opened.head:
        model.lm_head = torch.nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)
    for index in range(len(opened.parent.blocks)):
        for name, weight in opened.parent.block(index).items():
            model.get_submodule(name).weight.data.copy_(weight.dequantize(bits))
    return model


def test_every_width_and_allocation_by_argument_and_afterwards(llama: Opened, packed: Path, tmp_path: Path) -> None:
    reference = llama.in_memory()
    for bits in range(2, 9):
        set_bits(reference, bits)
        assert torch.equal(logits(read(packed, bits=bits)), logits(reference))
    allocation = {name: 2 + i % 7 for i, name in enumerate(llama.names())}
    file = tmp_path / "allocation.txt"
    file.write_text("".join(f"{name}: {bits}\n" for name, bits in allocation.items()))
    set_bits(reference, allocation)
    expected = logits(reference)
    model = read(packed, bits=allocation)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(read(packed, bits=str(file))), expected)
    model.set_bits(4)
    assert not torch.equal(logits(model), expected)
    model.set_bits(file)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")  # the widths of the moment are kept
    assert torch.equal(logits(read(tmp_path / "saved")), expected)
    written = llama.pack(tmp_path / "packed", widths=allocation)
    assert torch.equal(logits(read(written)), expected)
    assert read(written, bits=5).set_bits(5) == dict.fromkeys(allocation, 5)


@torch.no_grad()
def generated(model: Any, **settings: Any) -> list[int]:
    found = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)
    return found[0, IDS.shape[1] :].tolist()


def test_prompts_at_one_width_and_tokens_at_another(llama: Opened, packed: Path, tmp_path: Path) -> None:
    reference = llama.in_memory()
    set_bits(reference, 2, prefill=8)
    model = read(packed, bits=2, prefill_bits=8)
    expected = generated(reference)
    assert generated(model) == expected
    assert generated(model, cache_implementation="static") == expected
    model.save_pretrained(tmp_path / "saved")
    assert {layer.prefill_bits for layer in nested_layers(read(tmp_path / "saved")).values()} == {8}
    assert {layer.prefill_bits for layer in nested_layers(read(tmp_path / "saved", bits=2)).values()} == {2}
    model.set_bits(2)
    set_bits(reference, 2)
    assert generated(model) == generated(reference)


def test_a_compiled_model_gives_the_same_at_each_width(packed: Path) -> None:
    model = read(packed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for bits in (3, 8):
        model.set_bits(bits)
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_in_the_stored_dtype(packed: Path, device_map: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, bits=4)
    assert model.dtype == torch.float16
    assert {layer.scales.dtype for layer in nested_layers(model).values()} == {torch.float16}
    torch.testing.assert_close(logits(model).float(), logits(read(packed, bits=4)), rtol=0.1, atol=0.1)


def test_planes_that_are_not_asked_for_are_neither_read_nor_kept(packed: Path, tmp_path: Path) -> None:
    """A reader of 3 bits needs no file but those of 3 planes, which hold 3/8 of the plane bytes."""
    spec = parse_nested_config(json.loads((packed / "config.json").read_text())["quantization_config"])
    places = weight_map(packed)
    planes = {name: tensor.nbytes for name, tensor in spec.tensors().items() if ".plane" in name}
    for bits in (2, 3, 5):
        folder = tmp_path / str(bits)
        shutil.copytree(packed, folder)
        needed = {places[name] for name in planes if int(name[-1]) < bits}
        for file in set(places.values()) - needed:
            (folder / file).unlink()
        kept = sum(layer.planes.nbytes for layer in nested_layers(read(folder, max_bits=bits)).values())
        held = sum(size for name, size in planes.items() if places[name] in needed)
        assert kept * 8 == held * 8 == sum(planes.values()) * bits


def test_scales_of_a_bit_width_are_read_by_it_alone(tmp_path: Path) -> None:
    shares = {2: 0.5, 4: 0.75}
    opened = Opened(save(make_model("llama"), tmp_path / "model"), tmp_path / "store", scale_shares=shares)
    folder = opened.pack(tmp_path / "packed", widths=8)
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (content["format_version"], content["scale_bits"]) == (2, [2, 4])
    model = read(folder)
    name, layer = next(iter(nested_layers(model).items()))
    weight = opened.parent.block(0)[name]
    for bits, scales in {2: weight.own_scales[2], 3: weight.scales, 4: weight.own_scales[4], 8: weight.scales}.items():
        dense = dataclasses.replace(weight.for_bits(8), scales=scales).dequantize(bits)
        assert torch.equal(layer.nested_planes().dequantize(bits), dense)
    places = weight_map(folder)
    first = {places[n] for n in places if n.endswith(".scales2")}
    assert places[f"{name}.scales4"] == places[f"{name}.plane3"] not in first
    few = nested_layers(read(folder, max_bits=3))[name]
    assert {buffer for buffer, _ in few.named_buffers()} == {"planes", "scales", "scales2"}
    assert layer.to(torch.bfloat16).scales2.dtype == weight.scales.dtype


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_folder_of_few_planes_has_no_more(llama: Opened, packed: Path, tmp_path: Path) -> None:
    folder = llama.pack(tmp_path / "few", widths=3, max_bits=3)
    assert {name[-1] for name in weight_map(folder) if ".plane" in name} == {"0", "1", "2"}
    assert torch.equal(logits(read(folder)), logits(read(packed, bits=3)))
    with pytest.raises(UserError, match="4 bits cannot be read; .* at most 3 bits"):
        read(folder, bits=4)
    with pytest.raises(UserError, match="max_bits: 4 bits cannot be read"):
        read(folder, max_bits=4)


def test_files_are_as_large_as_the_original_s_and_ordered_by_plane(tmp_path: Path) -> None:
    original = save(make_model("qwen3", torch.bfloat16), tmp_path / "model", shard="40KB")
    limit = max(file.stat().st_size for file in original.glob("*.safetensors"))
    folder = Opened(original, tmp_path / "store").pack(tmp_path / "packed")
    places = weight_map(folder)
    assert all(file.stat().st_size <= limit + 16384 for file in folder.glob("*.safetensors"))  # headers are longer
    of_plane = [{places[n] for n in places if n.endswith(f".plane{d}")} for d in range(8)]
    assert of_plane[0] & of_plane[1]
    for lower, higher in itertools.pairwise(of_plane[1:]):
        assert max(lower) < min(higher)
    dense = {places[n] for n in places if ".plane" not in n}
    assert max(dense) < min(of_plane[2])
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    opened = Opened(save(make_model("qwen2"), tmp_path / "model"), tmp_path / "store")
    assert "lm_head.weight" not in weight_map(opened.pack(tmp_path / "packed"))
    model = read(tmp_path / "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_packing_holds_the_planes_of_one_layer_at_a_time(
    llama: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []
    real = NestedPlanes.pack

    def pack(*arguments: Any) -> NestedPlanes:
        alive.append(sum(reference() is not None for reference in made))
        planes = real(*arguments)
        made.append(weakref.ref(planes.planes))
        return planes

    monkeypatch.setattr(NestedPlanes, "pack", pack)
    llama.pack(tmp_path / "packed")
    assert len(alive) == len(llama.names())
    assert max(alive) <= 1
