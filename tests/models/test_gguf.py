"""GGUF files as input: the dequantized weights are those that the package gguf gives, and refusals are sentences."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from shared import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from matquant.models.config import ModelConfig
from matquant.models.gguf import convert_gguf
from matquant.store import Store

pytestmark = pytest.mark.slow

QUANTIZED = gguf.GGMLQuantizationType.Q8_0


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection of queries or keys in the order of llama.cpp, which pairs neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, file: Path, quantized: bool, architecture: str = "llama", parts: int = 1) -> None:
    """Write a Llama checkpoint as a GGUF file; matrices in Q8_0 or float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = tensor.numpy()
        projection = name.split(".")[-2]
        value = rotary_order(value, heads[projection]) if projection in heads else value
        kind = QUANTIZED if quantized and value.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(value), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_a_job_reads_the_weights_that_the_file_stands_for(
    matquant: Any, small_model: Path, tmp_path: Path, quantized: bool
):
    file = tmp_path / "small.gguf"
    write_gguf(small_model, file, quantized)
    status, _, err = matquant(
        f"model.path={file}", *SMALL, "method=rtn", "method.group_size=64", "bits=8", "pack=nested"
    )
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert any("29 of Q8_0" in warning for warning in results["warnings"]) == quantized
    (checkpoint,) = (tmp_path / "store" / "checkpoint").iterdir()
    expected = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    if quantized:
        for parameter in expected.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.detach().numpy(), QUANTIZED)
                parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, QUANTIZED))
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = [
        AutoTokenizer.from_pretrained(folder)("def main():\n    return 1")["input_ids"]
        for folder in (checkpoint, small_model)
    ]
    assert ids[0] == ids[1]
    assert (tmp_path / "run" / "packed" / "tokenizer.json").is_file()


def test_a_file_is_converted_once(small_model: Path, tmp_path: Path):
    file, store = tmp_path / "small.gguf", Store(tmp_path / "store")
    write_gguf(small_model, file, quantized=False)
    first, warnings = convert_gguf(ModelConfig(path=str(file)), store)
    written = Path(str(first.path), "model.safetensors").stat().st_mtime_ns
    second, _ = convert_gguf(ModelConfig(path=str(file), label="other"), store)
    assert warnings == []
    assert (second.path, second.label) == (first.path, "other")
    assert Path(str(second.path), "model.safetensors").stat().st_mtime_ns == written
    half, _ = convert_gguf(ModelConfig(path=str(file), dtype="float16"), store)
    assert half.path != first.path


def test_what_cannot_be_read_is_refused(matquant: Any, small_model: Path, tmp_path: Path):
    def refusal(name: str) -> str:
        status, _, err = matquant(f"model.path={tmp_path / name}", *SMALL)
        assert status == 2
        return err

    assert "is not a file" in refusal("absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "does not begin with GGUF" in refusal("text.gguf")
    write_gguf(small_model, tmp_path / "whole.gguf", quantized=False)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:5000])
    assert "is damaged" in refusal("cut.gguf")
    write_gguf(small_model, tmp_path / "part.gguf", quantized=False, parts=3)
    assert "one of 3 parts" in refusal("part.gguf")
    write_gguf(small_model, tmp_path / "unknown.gguf", quantized=False, architecture="abacus")
    assert "Transformers" in refusal("unknown.gguf")
