"""All supported architectures: discovery, loading, quantization and evaluation, block by block and in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, VOCABULARY, make_model, save
from quantizers import gptq
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.evaluate.slices import FULL, evaluate_slices
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.loading import LoadedModel, load_model, open_model
from matquant.models.tracing import check_blockwise_forward
from matquant.models.unquantized import unquantized_parameters
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layer_selection import layers_to_quantize
from matquant.store import Store

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def config(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


def tokens_of(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def quantize(blocks: BlockModel, folder: Path) -> Parent:
    layers = layers_to_quantize(blocks, lambda _: False, lm_head=False)
    quantizer = gptq({2: 1.0, 8: 64.0})
    driver = BlockwiseQuantizer(blocks, layers, quantizer, device=CPU, dtype=torch.float32, batch_size=4)
    build = lambda draft: {"label": "parent", "blocks": driver.run(draft, tokens_of(8, 24, 1))}  # noqa: E731
    return Parent(Store(folder).open_or_build("parent", {}, build))


def with_slice(loaded: LoadedModel, parent: Parent, bits: int) -> Any:
    """Model in memory whose quantized layers have the weights of one slice."""
    blocks = BlockModel(loaded.model)
    for index in range(len(blocks)):
        layers = blocks.linears(index)
        for name, weight in parent.block(index).items():
            layers[name].weight = torch.nn.Parameter(weight.dequantize(bits), requires_grad=False)
    return loaded.model


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_read_one_by_one_equal_the_model_in_memory(kind: str, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model", shard="100KB")
    ids = tokens_of(3, 16, 2)
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits

    opened = open_model(config(folder))
    streamed = BlockModel(opened.model, opened.checkpoint)
    check_blockwise_forward(streamed)
    parent = quantize(streamed, tmp_path / "streamed")
    in_memory = load_model(config(folder))
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
        logits = with_slice(load_model(config(folder)), parent, bits)(input_ids=ids).logits
        full, cut = (x[:, :-1].double().log_softmax(-1) for x in (expected, logits))
        kl = (full.exp() * (full - cut)).sum(-1).mean().item()
        assert found[str(bits)].kl == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_unquantized_parameters_are_listed_with_a_reason() -> None:
    model = make_model("mixtral")
    total = sum(p.numel() for p in model.parameters())
    blocks = BlockModel(model)
    layers = [name for index in (0, 1) for name in blocks.linears(index)]
    skipped = [name for name in layers if name.endswith("o_proj")]
    quantized = [name for name in layers if name not in skipped]
    rows = unquantized_parameters(blocks, quantized, dict.fromkeys(skipped, "skipped by method.skip"))
    assert {row["name"]: row["reason"] for row in rows} == {
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "the head; method.quantize_lm_head=true quantizes it",
        "model.layers.*.self_attn.o_proj.weight": "skipped by method.skip",
        "model.layers.*.mlp.gate.weight": "not a linear layer",
        "norms and biases": "norm or bias",
    }
    assert sum(row["parameters"] for row in rows) == total - sum(
        model.get_submodule(name).weight.numel() for name in quantized
    )


def test_experts_with_too_few_tokens_are_reported(tmp_path: Path) -> None:
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


def test_experts_in_several_parts_give_the_same_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = quantize(BlockModel(make_model("qwen3_moe")), tmp_path / "at_once")
    monkeypatch.setattr(
        "matquant.quantize.gptq.memory.MAX_HESSIAN_BYTES", 3 * 2 * 2 * 64**2 * 8
    )  # of three experts, or two streams
    parts = quantize(BlockModel(make_model("qwen3_moe")), tmp_path / "parts")
    assert at_once.undersampled_experts()
    assert parts.artifact.sha256 == at_once.artifact.sha256
