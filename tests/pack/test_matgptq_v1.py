"""The published MatGPTQ format: folders made from codes and scales here, without the project's own writer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import Opened, logits, method, read
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from matquant.errors import UserError
from matquant.inference import nested_layers
from matquant.pack.config import PackConfig
from matquant.pack.formats import FORMATS

GROUP = 32


def slice_of(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The definition: the top bits, rounded by the next one and held at the largest, around the middle code."""
    drop = 8 - bits
    cut = codes.int() >> drop
    if drop:
        cut = (cut + ((codes.int() >> (drop - 1)) & 1)).clamp(max=2**bits - 1)
    return ((cut << drop) - 128).float() * scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, tuple[Tensor, Tensor]]]:
    """The original, a published folder of it, and the codes and scales by layer."""
    original = save(make_model("qwen3", torch.float16), tmp_path_factory.mktemp("original"))
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(original, folder, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    layers = {}
    for key, tensor in load_file(original / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if key.endswith("_proj.weight"):
            codes = torch.randint(256, tensor.shape, generator=generator, dtype=torch.uint8)
            scales = torch.rand(tensor.shape[0], tensor.shape[1] // GROUP, generator=generator).half() / 100
            stored |= {f"{name}.qweight": codes, f"{name}.scales": scales}
            layers[name] = codes, scales
        else:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors")
    set_config(
        folder,
        {
            "group_size": GROUP,
            "modules_to_not_convert": ["lm_head", "norm"],
            "master_bitwidth": 8,
            "inference_bitwidth": 4,
            "quant_method": "matgptq_quant",
            "quant_dtype": "float16",
        },
    )
    return original, folder, layers


def set_config(folder: Path, quantization_config: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


def dense(made: Any, bits: int) -> Any:
    original, _, layers = made
    model = read(original).requires_grad_(False)
    for name, (codes, scales) in layers.items():
        model.get_submodule(name).weight.copy_(slice_of(codes, scales, bits))
    return model


def test_a_folder_made_from_codes_and_scales_gives_the_definition_s_logits(made: Any, tmp_path: Path) -> None:
    model = read(made[1])
    assert {layer.bits for layer in nested_layers(model).values()} == {4}  # its inference_bitwidth
    for bits in (4, 2, 3, 5, 6, 7, 8):
        model.set_bits(bits)
        torch.testing.assert_close(logits(model), logits(dense(made, bits)), rtol=1e-4, atol=1e-4)
    model.set_bits(3)
    model.save_pretrained(tmp_path / "nested")  # which converts it
    config = json.loads((tmp_path / "nested" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["slicing"], config["bits"]) == ("matquant", "round", 3)
    again = read(tmp_path / "nested", max_bits=3)
    assert torch.equal(logits(again), logits(model))
    assert {layer.planes.shape[0] for layer in nested_layers(again).values()} == {4}  # round reads one bit more


def test_the_width_is_chosen_by_its_config(made: Any) -> None:
    config = AutoConfig.from_pretrained(made[1])
    config.bits, config.max_bits = 2, 3
    model = AutoModelForCausalLM.from_pretrained(made[1], config=config, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(dense(made, 2)), rtol=1e-4, atol=1e-4)
    assert {layer.max_bits for layer in nested_layers(model).values()} == {3}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"master_bitwidth": 4}, "master_bitwidth must be 8"),
        ({"group_size": 0}, "group_size must be -1 or a whole number above 0; found 0"),
        ({"group_size": 48}, "groups of 48 do not divide its 64 input features"),
        ({"group_size": 64}, r"scales is F16 \[\d+, 2\] in model.safetensors; the model needs float16 \[\d+, 1\]"),
        ({"inference_bitwidth": 9}, "inference_bitwidth: a bit-width must be a whole number in 2..8; found 9"),
        ({"inference_bitwidth": None}, "inference_bitwidth: a bit-width must be a whole number in 2..8; found None"),
        ({"quant_dtype": "int8"}, "quant_dtype must be one of float16, bfloat16; found 'int8'"),
    ],
)
def test_a_wrong_config_is_refused(made: Any, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    shutil.copytree(made[1], tmp_path / "f")
    config = json.loads((tmp_path / "f" / "config.json").read_text())["quantization_config"]
    set_config(tmp_path / "f", config | changes)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "f")


@pytest.mark.parametrize("shape", [(63, 64), (64, 32), (64,)])
def test_codes_of_another_size_are_refused(made: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    shutil.copytree(made[1], tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.qweight"] = torch.zeros(shape, dtype=torch.uint8)
    save_file(tensors, tmp_path / "f" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj"):
        read(tmp_path / "f")


def test_a_parent_in_the_published_format(tmp_path: Path) -> None:
    folder = save(make_model("phi3", torch.float16), tmp_path / "model", shard="60KB")
    opened = Opened(folder, tmp_path / "store", slicing="round")
    packed = opened.pack(tmp_path / "packed", name="matgptq_v1", widths=3)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "matgptq_quant",
        "group_size": 32,
        "master_bitwidth": 8,
        "inference_bitwidth": 3,
        "quant_dtype": "float16",
        "modules_to_not_convert": ["lm_head", "norm"],
    }
    stored = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weight = opened.parent.block(1)["model.layers.1.mlp.down_proj"]
    assert torch.equal(stored["model.layers.1.mlp.down_proj.qweight"], weight.codes)
    assert torch.equal(stored["model.layers.1.mlp.down_proj.scales"], weight.scales)
    nested = opened.pack(tmp_path / "nested", widths=3)
    assert torch.equal(logits(read(packed)), logits(read(nested)))


def test_what_the_published_format_cannot_hold_is_refused(llama: Opened, tmp_path: Path) -> None:
    config = PackConfig(name="matgptq_v1")
    with pytest.raises(UserError, match="symmetric 8-bit codes that are cut by msb.*pack=nested holds this parent"):
        FORMATS["matgptq_v1"].check(config, method(), llama.specs())
    with pytest.raises(UserError, match="cut by msb"):
        llama.pack(tmp_path / "p", name="matgptq_v1")
    moe = Opened(save(make_model("mixtral", torch.float16), tmp_path / "m"), tmp_path / "s", slicing="round")
    with pytest.raises(UserError, match="no names for experts"):
        moe.pack(tmp_path / "p", name="matgptq_v1")
    with pytest.raises(UserError, match="holds one bit-width for all layers"):
        moe.pack(tmp_path / "p", name="matgptq_v1", widths=dict.fromkeys(moe.names(), 3))
    assert not list(tmp_path.glob("*p*"))
