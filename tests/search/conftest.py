"""A model of one or two blocks with a nested weight for each of its layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.models.blocks import BlockModel


@pytest.fixture(autouse=True)
def of_all_tests_here(one_thread: None) -> None: ...


def _nested(weight: torch.Tensor) -> NestedWeight:
    """Rounded to nearest on the grid of the widest slice, a scale for each row."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    codes = (weight.float() / scales.float() + 127.5).round().clamp(0, 255).to(torch.uint8)
    return NestedWeight(
        codes=codes,
        scales=scales,
        zeros=None,
        format=WeightFormat(master_bits=8, slicing="msb", group_size=weight.shape[1], scale_dtype=torch.float16),
    )


@pytest.fixture
def make_model():
    def make(blocks: int = 1, bias: bool = False) -> tuple[BlockModel, dict[str, NestedWeight]]:
        torch.manual_seed(blocks)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=blocks,
            vocab_size=64,
            max_position_embeddings=64,
            pad_token_id=None,
            attention_bias=bias,
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model = BlockModel(model.half().eval().requires_grad_(False))
        names = {name: layer for index in range(blocks) for name, layer in model.linears(index).items()}
        return model, {name: _nested(layer.weight) for name, layer in names.items()}

    return make
