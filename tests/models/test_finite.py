"""Weights, activations and logits that are not finite are found before any work, wherever they are."""

from pathlib import Path

import pytest
import torch
from architectures import make_model, save

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.finite import checked_logits, has_valid_logits, is_finite
from matquant.models.loading import open_model
from matquant.models.tracing import check_blockwise_forward


def opened(folder: Path, **settings: str) -> BlockModel:
    loaded = open_model(ModelConfig(path=str(folder), **settings))
    return BlockModel(loaded.model, loaded.checkpoint)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("opt", "model.decoder.project_out.weight"),
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h.bias"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),  # a buffer: NaN in it only misroutes
    ],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_damaged_tensor_is_named(kind: str, tensor: str, value: float, tmp_path: Path) -> None:
    model = make_model(kind)
    model.state_dict()[tensor].view(-1)[-1] = value  # the last row, which no probe reads
    with pytest.raises(UserError, match=f"The weights {tensor} hold NaN or Inf"):
        check_blockwise_forward(opened(save(model, tmp_path)))


def test_all_damaged_tensors_of_a_module_are_named() -> None:
    model = make_model("llama")
    for name in ("q_proj", "o_proj"):
        model.get_submodule(f"model.layers.0.self_attn.{name}").weight[0, 0] = torch.nan
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj\.weight, .*layers\.0\.self_attn\.o_proj\.weight"
    ):
        check_blockwise_forward(BlockModel(model))


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_conversion_that_overflows_is_found(tensor: str, tmp_path: Path) -> None:
    model = make_model("llama")
    model.state_dict()[tensor].view(-1)[0] = 1e6
    folder = save(model, tmp_path)
    check_blockwise_forward(opened(folder))
    with pytest.raises(UserError, match=rf"{tensor} hold NaN or Inf.*converts it to float16, choose bfloat16"):
        check_blockwise_forward(opened(folder, dtype="float16"))


def test_activations_that_overflow_are_found_although_the_weights_are_finite() -> None:
    model = make_model("llama")
    model.model.norm.weight.fill_(1e38)
    model.lm_head.weight.fill_(1e38)
    with pytest.raises(UserError, match=r"logits of LlamaForCausalLM hold NaN or Inf in float32, although"):
        check_blockwise_forward(BlockModel(model))
    model = make_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"outputs of model\.layers\.1 hold NaN or Inf in float32, although"):
        check_blockwise_forward(BlockModel(model))


def test_the_largest_value_of_every_tensor_is_returned() -> None:
    model = make_model("qwen2")  # its head is tied to the embeddings
    model.model.layers[1].mlp.up_proj.weight[0, 0] = -7.0
    found = check_blockwise_forward(BlockModel(model))
    assert found["model.layers.1.mlp.up_proj.weight"] == 7.0
    assert {name for name, _ in model.named_parameters()} <= found.keys()


def test_masked_logits_are_valid() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[..., 2:] = -torch.inf
    assert has_valid_logits(logits)
    for value in (torch.nan, torch.inf):
        logits[1, 2, 0] = value
        assert not has_valid_logits(logits)


def test_tensors_of_any_dtype_and_size() -> None:
    assert is_finite()
    assert is_finite(torch.arange(3), torch.empty(0), torch.ones(2, dtype=torch.bfloat16))
    assert not is_finite(torch.ones(2), torch.tensor([1.0, torch.inf]).half())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_a_whole_model_are_checked_inside_the_context_only(kind: str) -> None:
    model = make_model(kind)
    ids = torch.arange(4)[None]
    with checked_logits(model, "this model"):
        model(input_ids=ids)
        model.get_output_embeddings().weight[3] = torch.nan
        with pytest.raises(UserError, match="logits of this model hold NaN or Inf"):
            model(input_ids=ids)
    model(input_ids=ids)
