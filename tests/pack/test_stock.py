"""Exports in stock formats, read back by nothing but what the formats say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import Opened
from safetensors.torch import load_file
from torch import Tensor

from matquant.errors import UserError
from matquant.pack.config import PackConfig
from matquant.pack.stage import Packing


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes from 32-bit words along the last dimension: code i begins at bit ``bits * i``."""
    bit = (words[..., None] >> torch.arange(32)) & 1  # one number for each bit
    stream = bit.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (stream << torch.arange(bits)).sum(-1)


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """Decode GPTQ v1 tensors: zero points are stored less one."""
    scales, group_of = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
    codes = unpack(tensors[f"{name}.qweight"].t(), bits, len(group_of)).t()
    zeros = unpack(tensors[f"{name}.qzeros"], bits, scales.shape[1]) + 1
    return ((codes - zeros[group_of]) * scales[group_of]).t()


def compressed_weight(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """Decode compressed-tensors tensors."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scales = tensors[f"{name}.weight_scale"].float()
    zeros: Any = 2 ** (bits - 1)
    if f"{name}.weight_zero_point" in tensors:
        packed = tensors[f"{name}.weight_zero_point"]
        zeros = unpack(packed.t(), bits, rows).t().repeat_interleave(columns // packed.shape[1], 1)
    codes = unpack(tensors[f"{name}.weight_packed"], bits, columns)
    return (codes - zeros) * scales.repeat_interleave(columns // scales.shape[1], 1)


def stored_bits(config: dict[str, Any], name: str) -> int:
    """Bits of one layer's codes, as the config says."""
    if config["quant_method"] == "gptq":
        for pattern, own in config.get("dynamic", {}).items():
            if pattern.startswith("+:") and re.match(pattern[2:], name):
                return own["bits"]
        return config["bits"]
    for group in config["config_groups"].values():
        if group["targets"] == ["Linear"] or name in group["targets"]:
            return group["weights"]["num_bits"]
    raise KeyError(name)


def check(opened: Opened, folder: Path, widths: Any) -> dict[str, Any]:
    """Every layer dequantizes to its slice, and all else is as in the model."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dequantize = gptq_weight if config["quant_method"] == "gptq" else compressed_weight
    tensors = load_file(folder / "model.safetensors")
    names = set()
    for index in range(len(opened.parent.blocks)):
        for name, weight in opened.parent.block(index).items():
            width = widths if isinstance(widths, int) else widths[name]
            assert torch.equal(dequantize(tensors, name, stored_bits(config, name)), weight.dequantize(width)), name
            names.add(name)
    original = load_file(Path(opened.config.path) / "model.safetensors")
    for key, tensor in original.items():
        if key.removesuffix(".weight") not in names:
            assert torch.equal(tensors[key], tensor)
    return config


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """With the offset of the default method, so that groups are mirrored."""
    folder = tmp_path_factory.mktemp("mirrored")
    model = save(make_model("llama", torch.float16), folder / "model")
    return Opened(model, folder / "store", slicing="msb", zero_point_offset=8.0)


@pytest.mark.parametrize("form", ["gptq", "compressed_tensors"])
@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7])
def test_slices_with_an_offset(mirrored, tmp_path, form, width):
    config = check(mirrored, mirrored.pack(tmp_path / "out", width, name=form), width)
    if width == 4:
        assert stored_bits(config, "model.layers.0.mlp.up_proj") == 4


@pytest.mark.parametrize("form", ["gptq", "compressed_tensors"])
def test_an_allocation_keeps_one_kind_of_code_where_runtimes_fuse(mirrored, tmp_path, form):
    own = {"q_proj": 2, "k_proj": 4, "v_proj": 3, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 6}
    widths = {name: own[name.rpartition(".")[2]] for name in mirrored.names()}
    config = check(mirrored, mirrored.pack(tmp_path / "out", widths, name=form), widths)
    bits = {name: stored_bits(config, name) for name in mirrored.names()}
    for layer in range(2):
        q, k, v = (bits[f"model.layers.{layer}.self_attn.{kind}_proj"] for kind in "qkv")
        assert q == k == v == (8 if form == "gptq" else 5)
        assert bits[f"model.layers.{layer}.mlp.gate_proj"] == 4


def test_rounded_slices_have_codes_of_their_own_width(tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("rounded")
    model = save(make_model("llama", torch.float16), folder / "model")
    opened = Opened(model, folder / "store", slicing="round", zero_point_offset=0.0)
    for width in (2, 3, 4, 8):
        for form in ("gptq", "compressed_tensors"):
            config = check(opened, opened.pack(tmp_path / f"{form}{width}", width, name=form), width)
            assert stored_bits(config, "model.layers.0.mlp.up_proj") == width


def test_only_slices_of_up_to_four_bits_of_stretched_planes_are_exact(tmp_path):
    model = save(make_model("llama", torch.float16), tmp_path / "model")
    opened = Opened(model, tmp_path / "store", slicing="msb", zero_point_offset=8.0, stretch=1.25)
    for form in ("gptq", "compressed_tensors"):
        check(opened, opened.pack(tmp_path / form, 4, name=form), 4)
        with pytest.raises(UserError, match=r"the 6-bit slice of .* is not exact in codes of any size"):
            opened.pack(tmp_path / "out", 6, name=form)


def test_what_is_not_exact_is_refused_with_alternatives(mirrored, tmp_path):
    with pytest.raises(UserError, match=r"the 8-bit slice of .* is not exact in codes of any size") as refused:
        mirrored.pack(tmp_path / "out", 8, name="gptq")
    sentence = str(refused.value)
    for part in (
        "pack=gptq pack.bits=2, 3, 5, 6, 7 in 8-bit codes (",
        "4 in 4-bit codes (",
        "in 5-bit codes",
        " MB)",
        "pack=nested",
        "pack.rounding=nearest",
    ):
        assert part in sentence
    with pytest.raises(UserError, match=r"the 3-bit slice of .* is not exact in codes of 4 bits"):
        mirrored.pack(tmp_path / "out", 3, name="compressed_tensors", stored_bits=4)
    with pytest.raises(UserError, match=r"pack=gptq has codes of 2, 3, 4, 8 bits; found pack.stored_bits=5"):
        mirrored.pack(tmp_path / "out", 3, name="gptq", stored_bits=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gptq", "compressed_tensors"])
def test_the_nearest_codes_and_their_error(mirrored, tmp_path, form):
    folder = mirrored.pack(tmp_path / "out", 8, name=form, rounding="nearest")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dequantize = gptq_weight if form == "gptq" else compressed_weight
    tensors = load_file(folder / "model.safetensors")
    for name, weight in mirrored.parent.block(0).items():
        error = (
            dequantize(tensors, name, stored_bits(config, name)) - weight.dequantize(8)
        ).norm() / weight.dequantize(8).norm()
        assert 0 < error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gptq", "compressed_tensors", "matgptq_v1"])
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"hidden_size": 96, "intermediate_size": 64},
            r"groups of 64 leave a shorter last group in the 96 input features of model.layers.0.self_attn.q_proj and 9 more "
            r"layers. Set method.group_size \(and method.overrides\) to one of 32, 128, -1 \(-1: one scale per row\), or use "
            r"pack=nested",
        ),
        (
            {"hidden_size": 64, "intermediate_size": 160},
            r"groups of 64 leave a shorter last group in the 160 input features of model.layers.0.mlp.down_proj and 1 more",
        ),
    ],
)
def test_a_short_last_group_is_refused_with_the_group_sizes_that_fit(form, sizes, sentence, tmp_path):
    saved = save(make_model("llama", torch.float16, **sizes), tmp_path / "model")
    opened = Opened(saved, tmp_path / "store", group_size=64, slicing="round", zero_point_offset=0.0)
    settings = PackConfig(name=form, path=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"pack={form} holds groups of equal size only, but {sentence}"):
        Packing(settings, opened.specs(), opened.method, tmp_path, opened.loaded)
    fitting = Opened(saved, tmp_path / "fitting", group_size=32, slicing="round", zero_point_offset=0.0)
    fitting.pack(tmp_path / "out", 4, name=form)
    if form != "matgptq_v1":
        check(fitting, tmp_path / "out", 4)


def test_rows_shorter_than_a_group_have_one_scale(tmp_path):
    """Their group size is that of the row, which stock formats write as -1."""
    saved = save(make_model("llama", torch.float16, intermediate_size=128), tmp_path / "model")
    opened = Opened(saved, tmp_path / "store", group_size=128, slicing="round", zero_point_offset=0.0)
    assert {spec.format.group_size for spec in opened.specs().values()} == {64, 128}
    for form in ("gptq", "compressed_tensors"):
        check(opened, opened.pack(tmp_path / form, 4, name=form), 4)


def test_sizes_that_do_not_fill_words_are_refused_before_any_work(tmp_path):
    opened = Opened(save(make_model("llama", torch.float16, hidden_size=72), tmp_path / "model"), tmp_path / "store")
    settings = PackConfig(name="gptq", path=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"multiples of 32; model.layers.0.self_attn.q_proj is \[64, 72\]. Leave"):
        Packing(settings, opened.specs(), opened.method, tmp_path, opened.loaded)


def test_experts_are_refused(tmp_path):
    opened = Opened(save(make_model("mixtral", torch.float16), tmp_path / "model"), tmp_path / "store")
    with pytest.raises(UserError, match="does not hold mixtures of experts yet"):
        opened.pack(tmp_path / "out", 4, name="gptq", rounding="nearest")
