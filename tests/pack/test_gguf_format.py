"""GGUF files of slices, read back by the package gguf and by Transformers, and refusals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import make_model, save
from packing import Opened
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from matquant.errors import UserError
from matquant.models.gguf import VOCABULARY_FILE
from matquant.pack.config import PackConfig
from matquant.pack.gguf.vocabulary import vocabulary_of
from matquant.pack.stage import Packing
from matquant.transforms.rotation import RotationConfig

SHARES = {2: 0.5, 3: 0.75, 4: 0.75}  # scales of their own


def read(folder: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Tensors (float32) and metadata of the only GGUF file of a folder."""
    (file,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    values = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return values, fields | {"types": {t.name: t.tensor_type.name for t in reader.tensors}}


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of llama.cpp, one by one."""
    size = len(weight) // heads
    rows = [head * size + half * size // 2 + j for head in range(heads) for j in range(size // 2) for half in (0, 1)]
    return weight[rows]


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("gguf")
    model = save(make_model("llama", torch.float16, vocab_size=2048), folder / "model")
    return Opened(model, folder / "store", zero_point_offset=8.0, scale_shares=SHARES)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, "allocation"])
def test_tensors_of_a_file_are_those_of_the_slice(llama_model: Opened, tmp_path: Path, bits: Any) -> None:
    own = {"q_proj": 2, "k_proj": 4, "v_proj": 3, "o_proj": 4, "gate_proj": 5, "up_proj": 4, "down_proj": 6}
    widths = {n: own[n.rpartition(".")[2]] if bits == "allocation" else bits for n in llama_model.names()}
    folder = llama_model.pack(tmp_path / "out", widths if bits == "allocation" else bits, name="gguf")
    tensors, fields = read(folder)
    heads = {"q_proj": 4, "k_proj": 2}
    for index in range(2):
        for name, weight in llama_model.parent.block(index).items():
            exact = weight.dequantize(widths[name])
            last = name.rpartition(".")[2]
            exact = rotary_order(exact, heads[last]) if last in heads else exact
            place = f"blk.{index}.{NAMES[name.removeprefix(f'model.layers.{index}.')]}.weight"
            assert torch.equal(tensors[place], exact), name
            kind = {2: "Q5_0", 3: "Q5_0", 4: "Q4_0", 5: "Q8_0", 6: "Q8_0"}[widths[name]]
            assert fields["types"][place] == kind
    assert fields["matquant.exact"]
    assert fields["matquant.parent.sha256"] == llama_model.parent.artifact.sha256
    assert (fields["general.quantization_version"], fields["general.architecture"]) == (2, "llama")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", f"model-{_width(bits)}.gguf"]


def _width(bits: Any) -> str:
    return bits if isinstance(bits, str) else f"{bits}bit"


FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "qwen2_moe", "qwen3_moe", "phi3"]


def check_read_by_transformers(folder: Path, opened: Opened) -> None:
    """Transformers reads the 4-bit slice, and everything else as in the model."""
    (file,) = folder.glob("*.gguf")
    config = AutoConfig.from_pretrained(opened.config.path)
    # It does not read the sizes of experts, and gives Phi-3 a padding token beyond a small vocabulary.
    own = {"config": config} if "moe" in config.model_type or config.model_type == "phi3" else {}
    found = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32, **own)
    expected = AutoModelForCausalLM.from_pretrained(opened.config.path, dtype=torch.float32).state_dict()
    for block in range(2):
        for name, weight in opened.parent.block(block).items():
            origin = opened.blocks.source_views.get(f"{name}.weight")
            stored = expected[f"{name}.weight"] if origin is None else origin.view(expected[origin.name])
            stored.copy_(weight.dequantize(4))
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Norms of Gemma are stored plus one.
        equal = torch.allclose(state[name], tensor, atol=1e-6) if "norm" in name else torch.equal(state[name], tensor)
        assert equal, name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_slice_from_the_file(family: str, tmp_path: Path) -> None:
    opened = Opened(
        save(make_model(family, torch.float16, vocab_size=2048), tmp_path / "model"),
        tmp_path / "store",
        zero_point_offset=8.0,
        scale_shares=SHARES,
    )
    check_read_by_transformers(opened.pack(tmp_path / "out", 4, name="gguf"), opened)


@pytest.mark.slow
def test_nearest_values_have_the_width_of_the_slice_and_a_recorded_error(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "vocab_size": 2048}
    opened = Opened(
        save(make_model("llama", torch.float16, **wide), tmp_path / "model"),
        tmp_path / "store",
        zero_point_offset=8.0,
        group_size=128,
        scale_shares=SHARES,
    )
    expected = {2: "Q2_K", 3: "Q3_K", 4: "Q4_0", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
    for bits, kind in expected.items():
        tensors, fields = read(opened.pack(tmp_path / f"{bits}", bits, name="gguf", rounding="nearest"))
        assert fields["types"]["blk.0.ffn_down.weight"] == kind
        exact = opened.parent.block(0)["model.layers.0.mlp.down_proj"].dequantize(bits)
        error = (tensors["blk.0.ffn_down.weight"] - exact).norm() / exact.norm()
        assert fields["matquant.exact"] == (bits == 4) == (error == 0)
        assert error < {2: 0.1, 3: 0.15}.get(bits, 0.02)
    _, fields = read(opened.pack(tmp_path / "stored", 2, name="gguf", rounding="nearest", stored_bits=3))
    assert fields["types"]["blk.0.ffn_down.weight"] == "Q3_K"


def test_stored_weights_are_those_of_the_file(llama_model: Opened, tmp_path: Path) -> None:
    from matquant.formats.slice_spec import SliceSpec

    config = PackConfig(name="gguf", path=str(tmp_path / "out"), rounding="nearest")
    packing = Packing(config, llama_model.specs(), llama_model.method, tmp_path, llama_model.loaded)
    variant = SliceSpec(name="v", parent=llama_model.parent, bits=8)
    about = {"model": "m", "method": "rtn", "command": "", "baseline": {}, "slices": []}
    record = packing.run(llama_model.loaded, llama_model.blocks, [variant], about)
    assert packing.stored_weights is not None
    assert 0 < record["error"]["mean"] <= record["error"]["largest"] < 0.02
    for block in range(2):
        found = packing.stored_weights(block)
        exact = variant.weights(block)
        assert found.keys() == exact.keys()
        for name, weight in exact.items():
            assert 0 < (found[name] - weight).norm() / weight.norm() <= record["error"]["largest"] * 1.001
    assert packing.stored_weights(2) == {}


@pytest.mark.parametrize(
    ("setting", "kind"), [("auto", "F16"), ("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("Q8_0", "Q8_0")]
)
def test_type_of_embeddings(llama_model: Opened, tmp_path: Path, setting: str, kind: str) -> None:
    tensors, fields = read(llama_model.pack(tmp_path / "out", 4, name="gguf", dense_type=setting))
    assert fields["types"]["token_embd.weight"] == kind
    assert fields["types"]["blk.0.attn_norm.weight"] == "F32"
    stored = dict(llama_model.loaded.checkpoint.read(["model.embed_tokens.weight"]))
    original = stored["model.embed_tokens.weight"].float()
    error = (tensors["token_embd.weight"] - original).norm() / original.norm()
    assert (error == 0) == (kind in ("F16", "F32"))
    assert error < 0.01


@pytest.mark.slow
def test_a_rotated_model_has_norms_of_one_and_a_head(tmp_path: Path) -> None:
    opened = Opened(
        save(make_model("llama", torch.float16, vocab_size=2048), tmp_path / "model"),
        tmp_path / "store",
        zero_point_offset=8.0,
        transform=RotationConfig(),
    )
    tensors, _ = read(opened.pack(tmp_path / "out", 4, name="gguf"))
    assert torch.equal(tensors["blk.1.ffn_norm.weight"], torch.ones(64))
    assert torch.equal(tensors["output.weight"], opened.blocks.read_tensor("lm_head.weight").float())


def test_a_quantized_head_is_the_output(tmp_path: Path) -> None:
    model = save(make_model("llama", torch.float16, vocab_size=2048, tie_word_embeddings=True), tmp_path / "model")
    opened = Opened(model, tmp_path / "store", zero_point_offset=8.0, head=True)
    tensors, fields = read(opened.pack(tmp_path / "out", 4, name="gguf"))
    (head,) = opened.parent.block(2).values()
    assert torch.equal(tensors["output.weight"], head.dequantize(4))
    assert fields["types"]["output.weight"] == "Q4_0"


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["experts", "experts.3."])
def test_experts_that_are_not_quantized_are_stacked(tmp_path: Path, skip: str) -> None:
    model = save(make_model("qwen3_moe", torch.float16, vocab_size=2048), tmp_path / "model")
    opened = Opened(model, tmp_path / "store", zero_point_offset=8.0, skip=skip)
    check_read_by_transformers(opened.pack(tmp_path / "out", 4, name="gguf"), opened)


@pytest.mark.parametrize("bits", [7, 8])
def test_an_inexact_width_is_refused_with_alternatives(llama_model: Opened, tmp_path: Path, bits: int) -> None:
    with pytest.raises(UserError, match=f"the {bits}-bit slice of model.layers.0") as refused:
        llama_model.pack(tmp_path / "out", bits, name="gguf")
    for part in (
        "is not exact in any type of GGUF",
        "pack.bits=2, 3 in Q5_0 (",
        "pack.bits=4 in Q4_0 (",
        "pack.bits=5, 6 in Q8_0 (",
        " MB)",
        f"pack.rounding=nearest stores the nearest values, with a recorded error: {bits} bits in Q8_0 (",
        "pack=nested",
    ):
        assert part in str(refused.value)
    settings = PackConfig(name="gguf", path=str(tmp_path / "out"), bits=str(bits))
    with pytest.raises(UserError, match="is not exact in any type of GGUF"):  # before anything is quantized
        Packing(settings, llama_model.specs(), llama_model.method, tmp_path, llama_model.loaded)
    assert not (tmp_path / "out").exists()


def test_zero_points_of_groups_have_no_exact_type(tmp_path: Path) -> None:
    model = save(make_model("llama", torch.float16, vocab_size=2048), tmp_path / "model")
    opened = Opened(model, tmp_path / "store", symmetric=False, zero_point_offset=0.0)
    for bits in (2, 4, 8):
        with pytest.raises(UserError, match="is not exact in any type of GGUF. pack.rounding=nearest stores"):
            opened.pack(tmp_path / "out", bits, name="gguf")
    tensors, fields = read(opened.pack(tmp_path / "out", 8, name="gguf", rounding="nearest"))
    exact = opened.parent.block(1)["model.layers.1.mlp.up_proj"].dequantize(8)
    assert (tensors["blk.1.ffn_up.weight"] - exact).norm() < 0.02 * exact.norm()
    assert not fields["matquant.exact"]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-9, 1e8])
def test_scales_beyond_float16_are_refused(tmp_path: Path, factor: float) -> None:
    model = make_model("llama", torch.bfloat16, vocab_size=2048)
    model.model.layers[1].mlp.up_proj.weight.mul_(factor)
    opened = Opened(save(model, tmp_path / "model"), tmp_path / "store", zero_point_offset=8.0)
    sentence = r"of model.layers.1.mlp.up_proj is not exact .* GGUF has scales in float16: those .* in bfloat16"
    with pytest.raises(UserError, match=sentence):
        opened.pack(tmp_path / "out", 4, name="gguf")
    assert not (tmp_path / "out").exists()
    opened.pack(tmp_path / "out", 3, name="gguf", rounding="nearest")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("opt", {}, "does not know the architecture opt. It writes llama, mistral"),
        ("granite", {}, "does not know the architecture granite"),
        ("deepseek_v3", {}, "does not know the architecture deepseek_v3"),
        ("llama", {"hidden_act": "gelu"}, "does not run llama with the activation function gelu"),
        ("gemma2", {"query_pre_attn_scalar": 20}, r"gemma2 with query_pre_attn_scalar=20 \(it has 16\)"),
        ("gemma3_text", {"query_pre_attn_scalar": 20}, "gemma3_text with query_pre_attn_scalar=20"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3_moe with norm_topk_prob=False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2_moe with norm_topk_prob=True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings of type dynamic",
        ),
        ("gemma2", {"tie_word_embeddings": False}, "the architecture gemma2 of llama.cpp has no tensor for lm_head"),
        ("llama", {"hidden_size": 80}, "blocks of 32 columns, but model.layers.0.self_attn.q_proj and 9 more"),
    ],
)
def test_models_that_llama_cpp_does_not_run_are_refused_before_work(
    family: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    opened = Opened(save(make_model(family, torch.float16, **changes), tmp_path / "model"), tmp_path / "store")
    settings = PackConfig(name="gguf", path=str(tmp_path / "out"), rounding="nearest")
    with pytest.raises(UserError, match=sentence):
        Packing(settings, opened.specs(), opened.method, tmp_path, opened.loaded)


@pytest.mark.parametrize(("setting", "value"), [("prefill_bits", 2), ("shard_gb", 1.0)])
def test_settings_without_meaning_are_refused(llama_model: Opened, tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"pack.{setting} has no meaning"):
        llama_model.pack(tmp_path / "out", 4, name="gguf", **{setting: value})


def test_the_package_gguf_is_named_when_it_is_missing(
    llama_model: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pack=gguf needs the package gguf.*pip install 'matquant\[gguf\]'"):
        llama_model.pack(tmp_path / "out", 4, name="gguf")


@pytest.mark.slow
def test_sliding_windows_that_llama_cpp_ignores_end_the_context(tmp_path: Path) -> None:
    for family, expected in (("mistral", 8), ("gemma2", 64)):
        model = save(make_model(family, torch.float16, vocab_size=2048), tmp_path / family)
        opened = Opened(model, tmp_path / f"{family}-store", zero_point_offset=8.0)
        _, fields = read(opened.pack(tmp_path / f"{family}-out", 4, name="gguf"))
        assert fields[f"{fields['general.architecture']}.context_length"] == expected


def test_a_vocabulary_of_a_gguf_file_is_kept(llama_model: Opened, tmp_path: Path) -> None:
    """It is stored beside the converted weights, with entries that a folder's tokenizer does not have."""
    entries = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    from matquant.pack.gguf.vocabulary import Vocabulary

    writer = gguf.GGUFWriter(tmp_path / VOCABULARY_FILE, "llama")
    Vocabulary(entries=entries).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer, config = llama_model.loaded.tokenizer, llama_model.loaded.model.config
    assert dict(vocabulary_of(tmp_path, tokenizer, config).entries) == entries
