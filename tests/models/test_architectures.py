"""Every architecture: found, read block by block, quantized, measured, kept in a store, and the same from there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, VOCABULARY, make_model, save
from quantizers import gptq
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.config import ModelConfig
from matquant.evaluate.slices import FULL, evaluate_slices
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel
from matquant.models.loading import LoadedModel, load, open_model
from matquant.models.summary import fused_groups, unquantized_parameters
from matquant.models.tracing import check
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layers import layers_to_quantize
from matquant.store import Store

CPU = torch.device("cpu")


def config(folder: Path) -> ModelConfig:
    return ModelConfig(label=None, name=None, path=str(folder), revision=None, dtype="auto", trust_remote_code=False)


def windows_of(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def quantize(blocks: BlockModel, folder: Path) -> Parent:
    layers = layers_to_quantize(blocks, lambda _: False, lm_head=False)
    quantizer = gptq({2: 1.0, 8: 64.0})
    driver = BlockwiseQuantizer(blocks, layers, quantizer, device=CPU, dtype=torch.float32, batch_size=4)
    build = lambda draft: {"label": "parent", "blocks": driver.run(draft, windows_of(8, 24, 1))}  # noqa: E731
    return Parent(Store(folder).open_or_build("parent", {}, build))


def with_slice(loaded: LoadedModel, parent: Parent, bits: int) -> Any:
    """The model in memory, its quantized layers replaced by a slice."""
    blocks = BlockModel(loaded.model)
    for index in range(len(blocks)):
        layers = blocks.linears(index)
        for name, weight in parent.block(index).items():
            layers[name].weight = torch.nn.Parameter(weight.dequantize(bits), requires_grad=False)
    return loaded.model


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantize_evaluate_save_load(kind: str, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model", shard="100KB")
    ids = windows_of(3, 16, 2)
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits

    opened = open_model(config(folder))
    streamed = BlockModel(opened.model, opened.checkpoint)
    check(streamed)
    parent = quantize(streamed, tmp_path / "streamed")
    in_memory = load(config(folder))
    torch.testing.assert_close(in_memory.model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert quantize(BlockModel(in_memory.model), tmp_path / "memory").artifact.sha256 == parent.artifact.sha256

    def weights_of(index: int, bits: str) -> Mapping[str, Tensor]:
        weights = parent.block(index) if index < len(streamed) else {}
        return {name: w.dequantize(int(bits)) for name, w in weights.items()}

    found = evaluate_slices(streamed, ids, weights_of, ["2", "8"], 2, "cpu")
    assert found[FULL].kl == 0 < found["8"].kl < found["2"].kl
    assert found["8"].kl < 0.01
    assert all(tensor.is_meta for block in streamed.blocks for tensor in block.parameters())

    for bits in (2, 8):
        logits = with_slice(load(config(folder)), parent, bits)(input_ids=ids).logits
        full, cut = (x[:, :-1].double().log_softmax(-1) for x in (expected, logits))
        kl = (full.exp() * (full - cut)).sum(-1).mean().item()
        assert found[str(bits)].kl == pytest.approx(kl, rel=1e-3, abs=1e-7)


FUSED = {
    "llama": [["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "phi3": [],
    "falcon": [],
    "opt": [["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]],
    "mixtral": [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        [f"mlp.experts.{i}.gate_up_proj" for i in range(4)],
        [f"mlp.experts.{i}.down_proj" for i in range(4)],
    ],
    "deepseek_v3": [
        ["self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj"],
        ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
        [f"mlp.experts.{i}.gate_up_proj" for i in range(4)],
        [f"mlp.experts.{i}.down_proj" for i in range(4)],
    ],
}


@pytest.mark.parametrize("kind", FUSED)
def test_which_layers_a_runtime_runs_as_one(kind: str, tmp_path: Path) -> None:
    opened = open_model(config(save(make_model(kind), tmp_path)))
    blocks = BlockModel(opened.model, opened.checkpoint)
    groups = fused_groups(blocks)
    assert sorted(name for group in groups for name in group) == sorted(n for i in (0, 1) for n in blocks.linears(i))
    last = [[n.removeprefix(f"{blocks.block_names[1]}.") for n in g] for g in groups if blocks.block_names[1] in g[0]]
    found = sorted(sorted(group) for group in last if len(group) > 1)
    assert found == sorted(sorted(group) for group in FUSED[kind])


def test_what_stays_as_it_is_is_listed_with_a_reason() -> None:
    model = make_model("mixtral")
    total = sum(p.numel() for p in model.parameters())
    blocks = BlockModel(model)
    layers = [name for index in (0, 1) for name in blocks.linears(index)]
    skipped = [name for name in layers if name.endswith("o_proj")]
    quantized = [name for name in layers if name not in skipped]
    rows = unquantized_parameters(blocks, quantized, skipped)
    assert {row["name"]: row["reason"] for row in rows} == {
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "the head; method.quantize_lm_head=true quantizes it",
        "model.layers.*.self_attn.o_proj.weight": "left out by method.skip",
        "model.layers.*.mlp.gate.weight": "no linear layer",
        "norms and biases": "norm or bias",
    }
    assert sum(row["parameters"] for row in rows) == total - sum(
        model.get_submodule(name).weight.numel() for name in quantized
    )


def test_experts_with_too_few_tokens_are_filled_and_named(tmp_path: Path) -> None:
    blocks = BlockModel(make_model("qwen3_moe"))
    parent = quantize(blocks, tmp_path)  # 192 tokens, 2 of 8 experts each: 48 for an expert, which has 64 inputs
    rows = [row for block in parent.blocks for row in block.get("experts", [])]
    assert rows
    assert all(row["tokens"] < row["inputs"] == 64 for row in rows)
    poor = {row["name"] for row in rows}
    assert all(".mlp.experts." in name for name in poor)
    for block in parent.blocks:
        for name in poor & block["layers"].keys():
            assert block["layers"][name]["errors"]["8"] < 0.01
    assert not any("rounded to nearest" in note for note in parent.notes())


def test_experts_in_parts_are_the_same_as_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = quantize(BlockModel(make_model("qwen3_moe")), tmp_path / "at_once")
    monkeypatch.setattr(
        "matquant.quantize.gptq.memory.MAX_HESSIAN_BYTES", 3 * 2 * 2 * 64**2 * 8
    )  # of three experts, or two streams
    parts = quantize(BlockModel(make_model("qwen3_moe")), tmp_path / "parts")
    assert at_once.undersampled_experts()
    assert parts.artifact.sha256 == at_once.artifact.sha256
