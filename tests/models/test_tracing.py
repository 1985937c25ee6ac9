"""Checks on a few tokens: input groups, and equality of block-by-block and whole forward pass."""

import pytest
import torch
from architectures import make_model
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


# Architectures that the block interface cannot carry


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma3n_text", r"passes \[4, 1, 2, 64\] to its blocks model.layers for \[1, 2\] tokens"),
        ("xlnet", r"passes \[2, 1, 64\] to its blocks transformer.layer for \[1, 2\] tokens"),
        ("reformer", "ReformerModelWithLMHead cannot be run block by block on tokens alone"),
        ("hrm_text", "does not run the blocks model.L_module.layers one after the other, each once: .* calls"),
        ("rwkv", "exchange more than hidden states"),
        ("xlm", "exchange more than hidden states"),
    ],
)
def test_architectures_are_refused_with_a_sentence(kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_blockwise_forward(BlockModel(make_model(kind)))


def test_a_block_that_passes_values_on_in_its_arguments_is_refused() -> None:
    """Right for one model at a time, but wrong as soon as two of them take turns."""
    model = make("llama")
    values: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers[:2]):

        def hook(_: nn.Module, args: tuple, output: Tensor, index: int = index) -> Tensor:
            if index == 0:
                values["first"] = output
                return output
            return output + values["first"].mean(1, keepdim=True) * 0.1

        layer.register_forward_hook(hook)
    with pytest.raises(UserError, match="exchange more than hidden states"):
        check_blockwise_forward(BlockModel(model))


def test_a_head_that_uses_the_output_of_an_inner_block_is_refused() -> None:
    model = make("llama")
    inner: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda _, args, output: inner.append(output))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + 0.01 * inner[-1],))
    with pytest.raises(UserError, match="exchange more than hidden states"):
        check_blockwise_forward(BlockModel(model))


def test_a_small_difference_of_small_outputs_is_found() -> None:
    """Hidden states of a few thousandths, whose changes an absolute tolerance would hide."""
    model = make("llama")
    for parameter in model.parameters():
        parameter.mul_(1e-2)
    model.model.layers[1].register_forward_hook(lambda _, args, output: output * (1 + 1e-3 * len(calls)))
    calls: list[None] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    with pytest.raises(UserError, match="exchange more than hidden states"):
        check_blockwise_forward(BlockModel(model))


def test_hidden_states_with_more_dimensions_run_block_by_block() -> None:
    blocks = BlockModel(make_model("deepseek_v4"))  # four residual streams
    check_blockwise_forward(blocks)
    inputs = blocks.capture_block_inputs(torch.arange(24).view(3, 8), 2, "cpu", torch.float32)
    assert inputs.hidden.shape == (3, 8, 4, 64)
