"""Warnings on a full-precision model that does not predict the text, and on slices that are worse than they should be."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.evaluate.plausibility import dtype_warnings, full_precision_warnings, kl_warnings, layer_warnings
from matquant.models.blocks import BlockModel

CPU = torch.device("cpu")
BOS = 0
COUNTING = torch.arange(1, 25)


def counting_model() -> LlamaForCausalLM:
    """Model that predicts the successor of each token: its blocks change nothing, and its head is a shifted identity."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(32))
    model.lm_head.weight.copy_(2 * torch.eye(32).roll(1, 0))
    return model


def needs_bos(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Let the model predict nothing for a sequence that does not begin with the beginning-of-text token."""

    def forget(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (output[:, :1, BOS : BOS + 1] > 0.5) - 1e-3 * (output[:, :1, BOS : BOS + 1] <= 0.5)

    model.model.layers[0].register_forward_hook(forget)
    return model


def test_a_model_that_predicts_the_text_is_not_mentioned() -> None:
    blocks = BlockModel(counting_model())
    assert full_precision_warnings(blocks, {"calibration": COUNTING}, BOS, CPU) == []
    assert full_precision_warnings(blocks, {}, BOS, CPU) == []


@pytest.mark.parametrize("window", [COUNTING.flip(0), torch.tensor([5, 2, 9, 9, 1, 30, 4, 4])])
def test_a_text_that_the_model_does_not_predict_is_named(window: torch.Tensor) -> None:
    blocks = BlockModel(counting_model())
    windows = {"calibration": COUNTING, "eval.datasets.mine": window}
    (warning,) = full_precision_warnings(blocks, windows, None, CPU)
    assert "on a window of eval.datasets.mine: it does not predict this text" in warning


def test_a_missing_first_token_is_named_with_the_setting() -> None:
    blocks = BlockModel(needs_bos(counting_model()))
    with_bos = torch.cat([torch.tensor([BOS]), COUNTING])
    windows = {"calibration": COUNTING, "eval.datasets.a": with_bos, "eval.datasets.b": COUNTING}
    found = full_precision_warnings(blocks, windows, BOS, CPU)
    assert ["calibration.bos=true" in sentence for sentence in found] == [True, False]
    assert "eval.datasets.b.bos=true" in found[1]
    assert full_precision_warnings(BlockModel(counting_model()), windows, BOS, CPU) == []


@pytest.mark.parametrize(
    ("kl", "parts"),
    [
        ({2: 0.9, 4: 0.05, 8: 0.0001}, []),
        ({2: 0.9, 8: 0.011}, ["8 bits has a KL of 0.0110"]),
        ({2: 0.1, 3: 0.2, 8: 0.001}, ["0.100 at 2 bits and 0.200 at 3 bits"]),
        (
            {4: 0.3, 6: 0.3, 8: 0.3},
            ["8 bits has a KL", "at 4 bits and 0.300 at 6 bits", "at 6 bits and 0.300 at 8 bits"],
        ),
        ({6: 1e-6, 8: 2e-6}, []),  # below the rounding of float32
    ],
)
def test_kl_that_a_sound_parent_does_not_have(kl: dict[int, float], parts: list[str]) -> None:
    found = kl_warnings("stdlib", kl, torch.float32)
    assert len(found) == len(parts)
    assert all(part in sentence and "stdlib" in sentence for part, sentence in zip(parts, found, strict=True))


def test_rounding_of_half_precision_is_no_warning() -> None:
    assert kl_warnings("a", {6: 0.0012, 8: 0.0013}, torch.bfloat16) == []
    assert kl_warnings("a", {6: 0.0012, 8: 0.0013}, torch.float16) != []


def test_layers_without_any_output_are_named() -> None:
    errors = {"a.q_proj": {"2": 0.3, "8": 1e-5}, "a.k_proj": {"2": 1.0, "8": 0.995}, "b.up_proj": {"2": 1.2, "8": 0.1}}
    (sentence,) = layer_warnings(errors)
    assert "2 layers lose their output" in sentence
    assert "a.k_proj at 2, 8 bits, b.up_proj at 2 bits" in sentence
    assert layer_warnings({"a.q_proj": {"2": 0.9}}) == []


def test_figures_of_16_bit_computations_are_said_to_be_rough():
    assert dtype_warnings(torch.float32) == []
    for dtype, floor in ((torch.bfloat16, "0.005"), (torch.float16, "0.0001")):
        (sentence,) = dtype_warnings(dtype)
        assert str(dtype).removeprefix("torch.") in sentence
        assert f"KL of up to {floor}" in sentence
