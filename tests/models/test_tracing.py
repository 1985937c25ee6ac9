"""Checks on a few tokens: input groups, and equality of block-by-block and whole forward pass."""

import pytest
import torch
from decoders import make
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.models.tracing import check_blockwise_forward, shared_input_groups


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (
            "qwen3",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
        (
            "opt",
            [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
        ),
        ("gpt2", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
    ],
)
@pytest.mark.parametrize(
    ("inference", "dtype"), [(False, torch.float32), (True, torch.float16), (True, torch.bfloat16)]
)
def test_layers_are_grouped_by_their_input(
    kind: str, groups: list[list[str]], inference: bool, dtype: torch.dtype
) -> None:
    blocks = BlockModel(make(kind).to(dtype))
    with torch.inference_mode(inference):
        found = shared_input_groups(blocks, 1)
    short = [[name.removeprefix(f"{blocks.block_names[1]}.") for name in group] for group in found.groups]
    # The model calls q, k and v in its own order.
    assert [sorted(group) for group in short] == [sorted(group) for group in groups]
    assert not found.uncalled
    assert not any(layer._forward_pre_hooks for layer in blocks.linears(1).values())


def test_layers_that_are_not_called_are_reported() -> None:
    model = make("llama")
    model.model.layers[1].spare = nn.Linear(8, 8)
    found = shared_input_groups(BlockModel(model), 1)
    assert found.uncalled == ["model.layers.1.spare"]


def test_equal_inputs_in_different_tensors_are_not_a_group() -> None:
    model = make("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x + 0))
    groups = shared_input_groups(BlockModel(model), 0).groups
    assert [names[0].rsplit(".", 1)[-1] for names in groups] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_an_input_changed_in_place_is_another_input() -> None:
    model = make("llama")
    mlp = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        x = x.clone()
        gate = mlp.gate_proj(x)
        return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x.mul_(2)))

    mlp.forward = forward
    assert len(shared_input_groups(BlockModel(model), 0).groups) == 5


def test_blocks_that_exchange_more_than_hidden_states_are_refused() -> None:
    model = make("llama")
    first, second = model.model.layers[:2]
    left: list[Tensor] = []
    first.register_forward_hook(lambda _, args, output: left.append(output))
    second.register_forward_hook(lambda _, args, output: output + left[0] * len(left))
    with pytest.raises(UserError, match="exchange more than hidden states"):
        check_blockwise_forward(BlockModel(model))
