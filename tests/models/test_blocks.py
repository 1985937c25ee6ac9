"""Block-by-block execution of small random models, and temporary replacement of their weights."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
import torch
from architectures import make_model
from decoders import CONFIGS, SIZES, ids_of, make
from small_configs import small_config
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from matquant.errors import UserError
from matquant.models.block_kwargs import BlockKwargs
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.checkpoint import Checkpoint
from matquant.models.discovery import find_blocks
from matquant.models.materializer import WeightMaterializer
from matquant.models.tensor_swap import swapped_tensors
from matquant.models.tracing import check_blockwise_forward


def block_by_block(blocks: BlockModel, ids: Tensor) -> Tensor:
    """Logits of the model, its blocks run one after the other."""
    hidden, kwargs = blocks.capture_batch(ids)
    for index, own in enumerate(kwargs):
        hidden = blocks.run_block(index, hidden, own)
    return blocks.head(ids, hidden)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_block_by_block_equals_the_model_bit_for_bit(kind: str, batch: int) -> None:
    model, ids = make(kind), ids_of(batch)
    expected = model(input_ids=ids).logits
    blocks = BlockModel(model)
    assert len(blocks) == 3
    assert torch.equal(block_by_block(blocks, ids), expected)
    assert torch.equal(model(input_ids=ids).logits, expected)
    check_blockwise_forward(blocks)


def test_gemma_blocks_have_different_masks() -> None:
    _, kwargs = BlockModel(make("gemma2")).capture_batch(ids_of(1))
    sliding, full = kwargs[0].kwargs["attention_mask"], kwargs[1].kwargs["attention_mask"]
    assert not torch.equal(sliding, full)


def test_linears_have_full_names_in_module_order() -> None:
    model = make("llama")
    blocks = BlockModel(model)
    names = list(blocks.linears(2))
    assert names[0] == "model.layers.2.self_attn.q_proj"
    assert names[-1] == "model.layers.2.mlp.down_proj"
    assert all(model.get_submodule(name) is layer for name, layer in blocks.linears(2).items())
    assert (blocks.vocab_size, blocks.dtype) == (64, torch.float32)


def test_conv1d_weights_become_linear_on_the_same_storage() -> None:
    model = make("gpt2")
    stored = model.transformer.h[0].mlp.c_fc.weight
    layer = BlockModel(model).linears(0)["transformer.h.0.mlp.c_fc"]
    assert layer.weight.shape == (layer.out_features, layer.in_features) == (128, 32)
    assert layer.weight.data_ptr() == stored.data_ptr()
    assert not any(isinstance(module, Conv1D) for module in model.modules())


def test_forwards_are_restored_after_an_error() -> None:
    model, ids = make("llama"), ids_of(1)
    expected = model(input_ids=ids).logits
    blocks = BlockModel(model)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # an instance attribute, as accelerate's hooks leave it
    with pytest.raises(IndexError):
        blocks.capture_batch(torch.full((1, 4), 10**6))
    assert "forward" not in model.model.layers[0].__dict__
    assert model.model.layers[1].__dict__["forward"] is own
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_equal_arguments_of_two_batches_share_their_tensors() -> None:
    blocks = BlockModel(make("gemma2"))
    _, first = blocks.capture_batch(ids_of(2, seed=1))
    _, second = blocks.capture_batch(ids_of(2, seed=2), like=first)
    _, smaller = blocks.capture_batch(ids_of(1, seed=2), like=first)
    for a, b, c in zip(first, second, smaller, strict=True):
        assert b.kwargs["attention_mask"] is a.kwargs["attention_mask"]
        assert b.kwargs["position_embeddings"][0] is a.kwargs["position_embeddings"][0]
        assert c.kwargs["attention_mask"].shape[0] in (1, a.kwargs["attention_mask"].shape[0])


def test_arguments_that_depend_on_the_tokens_are_not_shared() -> None:
    model = make("llama")
    inner = model.model.layers[1]
    ids_now = [ids_of(1, seed=1)]
    # Some architectures pass token-dependent tensors to every block.
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": ids_now[0]}), with_kwargs=True
    )
    blocks = BlockModel(model)
    _, first = blocks.capture_batch(ids_now[0])
    ids_now[0] = ids_of(1, seed=2)
    _, second = blocks.capture_batch(ids_now[0], like=first)
    assert torch.equal(second[1].kwargs["position_ids"], ids_now[0])
    assert second[0].kwargs["position_ids"] is first[0].kwargs["position_ids"]
    assert inner is blocks.blocks[1]


def test_block_inputs_hold_every_batch() -> None:
    model, sequences = make("llama"), ids_of(5)
    blocks = BlockModel(model)
    found = blocks.capture_block_inputs(sequences, 2, "cpu", torch.float32)
    assert torch.equal(found.hidden[:], model.model.embed_tokens(sequences))
    assert [len(sequences[rows]) for rows in found.rows] == [2, 2, 1]
    assert len(found.kwargs) == 3


def test_hidden_states_are_bound_by_position_or_by_name() -> None:
    args, kwargs = BlockKwargs((None, 5), {"mask": 1}, 0).bind(torch.ones(1))
    assert (args, kwargs) == ((torch.ones(1), 5), {"mask": 1})
    args, kwargs = BlockKwargs((), {"hidden_states": None, "mask": 1}, "hidden_states").bind(torch.ones(1))
    assert (args, kwargs) == ((), {"hidden_states": torch.ones(1), "mask": 1})


class WrappedBlock(nn.Module):
    """Block whose output is in a container."""

    container: type | None = None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        hidden = self.block(hidden_states, **kwargs)
        return hidden if self.container is None else self.container((hidden, None))


class TupleBlock(WrappedBlock):
    container = tuple


class ListBlock(WrappedBlock):
    container = list


class SetBlock(WrappedBlock):
    container = set


def wrapped_blocks(monkeypatch: pytest.MonkeyPatch, classes: tuple[type[WrappedBlock], ...]) -> Any:
    """Llama whose blocks are of these classes."""
    model = make("llama")
    inner = model.model
    inner.layers = nn.ModuleList(kind(layer) for kind, layer in zip(classes, inner.layers, strict=True))

    def forward(input_ids: Tensor, **_: Any) -> Any:
        hidden = inner.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        embeddings = inner.rotary_emb(hidden, position_ids=positions)
        for layer in inner.layers:
            output = layer(hidden_states=hidden, position_embeddings=embeddings, attention_mask=None)
            assert type(output) is (layer.container or Tensor)
            hidden = output if layer.container is None else output[0]
        missing = dict.fromkeys(("past_key_values", "hidden_states", "attentions"))
        return type("Output", (), {"last_hidden_state": inner.norm(hidden), **missing})()

    monkeypatch.setattr(inner, "forward", forward)
    return model


@pytest.mark.parametrize(
    "classes",
    [(TupleBlock,) * 3, (ListBlock,) * 3, (WrappedBlock, ListBlock, TupleBlock), (TupleBlock,) * 2 + (WrappedBlock,)],
)
def test_blocks_that_return_containers(
    monkeypatch: pytest.MonkeyPatch, classes: tuple[type[WrappedBlock], ...]
) -> None:
    model, ids = make("llama"), ids_of(2)
    expected = model(input_ids=ids).logits
    assert torch.equal(block_by_block(BlockModel(wrapped_blocks(monkeypatch, classes)), ids), expected)


def test_blocks_that_return_another_container_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped_blocks(monkeypatch, (TupleBlock, SetBlock, TupleBlock))
    with pytest.raises(UserError, match="a block returns set"):
        check_blockwise_forward(BlockModel(model))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no list of decoder blocks"):
        BlockModel(nn.Sequential(nn.Linear(4, 4)))


def test_a_list_of_experts_inside_blocks_is_not_a_list_of_blocks() -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    assert BlockModel(model).name == "model.layers"


@pytest.mark.parametrize(
    ("kind", "name", "classes"),
    [
        ("jamba", "model.layers", {"JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"}),
        ("zamba2", "model.layers", {"Zamba2MambaDecoderLayer", "Zamba2HybridLayer"}),
        ("olmo_hybrid", "model.layers", {"OlmoHybridLinearAttentionDecoderLayer", "OlmoHybridAttentionDecoderLayer"}),
    ],
)
def test_blocks_of_several_classes(kind: str, name: str, classes: set[str]) -> None:
    blocks = BlockModel(make_model(kind))
    assert blocks.name == name
    assert {type(block).__name__ for block in blocks.blocks} == classes
    check_blockwise_forward(blocks)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("gemma3", {"vision_config": {"num_hidden_layers": 5}}, "model.language_model.layers"),
        ("got_ocr2", {"vision_config": {"num_hidden_layers": 4}}, "model.language_model.layers"),
        ("git", {}, "git.encoder.layer"),
        ("git", {"vision_config": {"num_hidden_layers": 6}}, "git.encoder.layer"),
        ("prophetnet", {"num_encoder_layers": 6}, "prophetnet.decoder.layers"),
    ],
)
def test_the_decoder_of_a_wrapper_is_found(kind: str, settings: dict[str, Any], name: str) -> None:
    """Lists of encoders may be longer than the decoder's, or as long."""
    model = AutoModelForCausalLM.from_config(small_config(kind, **settings))
    found, blocks = find_blocks(model)
    assert (found, len(blocks)) == (name, 2)


def test_longer_lists_beside_the_blocks_do_not_count() -> None:
    model = make("llama")
    model.model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    model.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
    assert find_blocks(model)[0] == "model.layers"


def test_fused_experts_run_block_by_block() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": None}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=4)).eval()
    assert torch.equal(block_by_block(BlockModel(model), ids_of(2)), model(input_ids=ids_of(2)).logits)


def test_a_model_that_skips_blocks_is_refused() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 2  # number of blocks that Transformers runs
    with pytest.raises(UserError, match=r"only 2 of 3 were called"):
        BlockModel(model).capture_batch(ids_of(1))


# Weights


def snapshot(model: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    """Identity, number of in-place writes and values of each tensor."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (id(t), t._version, t.clone()) for name, t in tensors}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[int, int, Tensor]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (identity, version, value) in before.items():
        assert after[name][:2] == (identity, version)
        assert torch.equal(after[name][2], value)


@pytest.mark.parametrize("inference", [False, True])
def test_a_half_precision_model_runs_in_float32(inference: bool) -> None:
    ids = ids_of(2)
    model = make("qwen3").half()  # tied embeddings
    before = snapshot(model)
    blocks = BlockModel(model)
    with torch.inference_mode(inference), blocks.head_on_device("cpu", torch.float32):
        hidden, kwargs = blocks.capture_batch(ids)
        for index, own in enumerate(kwargs):
            with blocks.on_device(index, "cpu", torch.float32):
                hidden = blocks.run_block(index, hidden, own)
        logits = blocks.head(ids, hidden)
    assert_unchanged(model, before)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model.float()(input_ids=ids).logits)


def test_replaced_weights_are_restored() -> None:
    model = make("llama").half()
    blocks = BlockModel(model)
    before = snapshot(model)
    name = "model.layers.1.mlp.down_proj"
    layer = blocks.linears(1)[name]
    with blocks.on_device(1, "cpu", torch.float32), blocks.with_weights(1, {name: torch.ones(32, 48).double()}):
        assert layer.weight.dtype == torch.float32
        assert (layer.weight == 1).all()
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="oh"), blocks.with_weights(1, {name: torch.ones(32, 48)}):
        raise RuntimeError("oh")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.down_proj", (32, 48), "not a linear layer of model.layers.1"),
        ("model.layers.1.mlp.down_proj", (48, 32), r"needs a weight of shape \(32, 48\); found \(48, 32\)"),
    ],
)
def test_wrong_replacement_weights_are_refused(name: str, shape: tuple[int, int], message: str) -> None:
    blocks = BlockModel(make("llama"))
    with pytest.raises(ValueError, match=message), blocks.with_weights(1, {name: torch.ones(shape)}):
        pass


def test_float32_tensors_of_a_half_precision_model_stay_float32() -> None:
    model = make("llama").half()
    norm = model.model.layers[0].input_layernorm
    norm.float()
    blocks = BlockModel(model)
    with blocks.on_device(0, "cpu", torch.bfloat16):
        assert norm.weight.dtype == torch.float32
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_stored_tensors_are_released() -> None:
    read: list[weakref.ref] = []

    class Stored:
        def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
            for name in names:
                tensor = torch.ones(8, 8, dtype=torch.float16)
                read.append(weakref.ref(tensor))
                yield name, tensor

    materializer = WeightMaterializer(cast(Checkpoint, Stored()), {}, torch.float16)
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to("meta")
    with materializer.materialized(layers, "", lambda _: True, "cpu", torch.float32):
        assert torch.equal(layers(torch.ones(8)), torch.full((8,), 64.0))
        assert read
        assert not any(reference() is not None for reference in read)


def test_tensors_are_restored_after_a_wrong_name() -> None:
    layer = nn.Linear(2, 2)
    own = layer.weight
    with pytest.raises(KeyError), swapped_tensors(layer, {"weight": torch.zeros(2, 2), "nothing": torch.zeros(1)}):
        pass
    assert layer.weight is own


# Gradients


def test_gradients_flow_from_a_block_through_replaced_weights() -> None:
    blocks = BlockModel(make("llama"))
    hidden, kwargs = blocks.capture_batch(ids_of(2))
    name = "model.layers.1.mlp.down_proj"
    scale = torch.ones(32, 1, requires_grad=True)
    weight = blocks.linears(1)[name].weight.clone()

    def output(factor: Tensor) -> Tensor:
        with blocks.with_weights(1, {name: weight * factor}):
            return blocks.run_block(1, hidden, kwargs[1])

    output(scale).square().sum().backward()
    assert scale.grad is not None
    step = torch.zeros_like(scale)
    step[3] = 1e-2
    with torch.no_grad():
        difference = (output(scale + step).square().sum() - output(scale - step).square().sum()) / 2e-2
    torch.testing.assert_close(scale.grad[3, 0], difference, rtol=1e-3, atol=1e-3)


def test_gradients_flow_from_the_logits_through_a_replaced_tied_head() -> None:
    model = make("qwen3")
    blocks, ids = BlockModel(model), ids_of(1)
    hidden = torch.randn(1, ids.shape[1], 32, requires_grad=True)
    head = model.lm_head.weight.clone().requires_grad_()
    with blocks.with_weights(len(blocks), {"lm_head": head}):
        blocks.head(ids, hidden).sum().backward()
    assert head.grad is not None
    assert hidden.grad is not None
    assert head.grad.abs().sum() > 0
    assert hidden.grad.abs().sum() > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_replaced_weights_without_gradients_are_parameters() -> None:
    model = make("qwen3").half()
    blocks = BlockModel(model)
    model.requires_grad_()  # no effect on the copies on the device
    with blocks.head_on_device("cpu", torch.float32):
        model.tie_weights()  # evaluation harnesses call it; it accepts parameters only
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float16


# Dtype


def test_cpus_compute_in_float32() -> None:
    assert compute_dtype(torch.float16, "cpu") == torch.float32
    assert compute_dtype(torch.bfloat16, torch.device("cuda", 1)) == torch.bfloat16
