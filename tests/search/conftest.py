"""Fixtures of the search tests: a random Llama of one or two blocks with a nested weight per layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockModel
from tests.search.evaluation import round_to_nearest


@pytest.fixture(autouse=True)
def use_one_thread(one_thread: None) -> None:
    """Run all tests of this folder on one thread."""


@pytest.fixture
def make_model():
    def make(blocks: int = 1, bias: bool = False) -> tuple[BlockModel, dict[str, NestedWeight]]:
        """Random model in float16, and the nested weights of its layers by name."""
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
        layers = {name: layer for index in range(blocks) for name, layer in model.linears(index).items()}
        return model, {name: round_to_nearest(layer.weight) for name, layer in layers.items()}

    return make
