"""Rotation of the residual stream: equal logits, block by block and in memory, and packed folders that hold it."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as tf
from architectures import SIZES, make_model, save
from packing import Opened, logits, read
from safetensors import safe_open
from shared import TINY
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices
from matquant.inference import replace_linears
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.loading import LoadedModel, load_model, open_model
from matquant.models.tracing import check_blockwise_forward
from matquant.transforms.config import TransformConfig
from matquant.transforms.registry import apply_transform, transform_from_json
from matquant.transforms.rotation import ResidualRotation, RotationConfig
from matquant.typed_config import build

CPU = torch.device("cpu")
IDS = torch.arange(48)[None] * 37 % 2048

# Largest difference of float32 logits relative to their root mean square: rounding of sums of 256 products.
FLOAT32_ROUNDING = 2e-5

MATRICES = ["hadamard", "orthogonal"]


def rotated(loaded: LoadedModel, **settings: Any) -> BlockModel:
    return BlockModel(loaded.model, loaded.checkpoint, RotationConfig(**settings).build(loaded.model))


def blockwise_logits(blocks: BlockModel, ids: Tensor) -> Tensor:
    """Float32 logits with one block on the device at a time."""
    with torch.no_grad():
        inputs = blocks.capture_block_inputs(ids, len(ids), CPU, torch.float32)
        hidden = inputs.hidden[:]
        for index, kwargs in enumerate(inputs.kwargs[0]):
            with blocks.on_device(index, CPU, torch.float32):
                hidden = blocks.run_block(index, hidden, kwargs)
        with blocks.head_on_device(CPU, torch.float32):
            return blocks.head(ids, hidden)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.slow
@pytest.mark.parametrize("matrix", MATRICES)
def test_logits_of_the_shipped_model_are_equal_in_float32(matrix: Literal["hadamard", "orthogonal"]) -> None:
    original = load_model(ModelConfig(path=str(TINY), dtype="float32")).model
    expected = original(input_ids=IDS).logits
    blocks = rotated(open_model(ModelConfig(path=str(TINY), dtype="float32")), matrix=matrix, seed=3)
    check_blockwise_forward(blocks)
    found = blockwise_logits(blocks, IDS)
    assert relative_difference(found, expected) < FLOAT32_ROUNDING
    apply_transform(original, RotationConfig(matrix=matrix, seed=3).build(original))
    assert torch.equal(original(input_ids=IDS).logits, found)


def test_the_rotation_changes_the_weights_that_touch_the_residual_stream_only() -> None:
    loaded = load_model(ModelConfig(path=str(TINY), dtype="float32"))
    before = {name: tensor.clone() for name, tensor in loaded.model.named_parameters()}
    apply_transform(loaded.model, RotationConfig().build(loaded.model))
    after = dict(loaded.model.named_parameters())
    assert set(after) - set(before) == {"lm_head.weight"}
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 13
    assert all((after[name] == 1).all() and not (before[name] == 1).all() for name in norms)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    # The other side of a linear layer is not rotated: products that do not involve the residual stream stay equal.
    up, gain = "model.layers.0.mlp.up_proj.weight", before["model.layers.0.post_attention_layernorm.weight"]
    folded = before[up] * gain
    torch.testing.assert_close(after[up] @ after[up].T, folded @ folded.T, rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_to_the_dtype_of_the_model() -> None:
    loaded = open_model(ModelConfig(path=str(TINY)))
    blocks = rotated(loaded)
    with blocks.on_device(0, CPU, torch.float32):
        weight = blocks.linears(0)["model.layers.0.mlp.up_proj"].weight.clone()
    assert torch.equal(weight, weight.half().float())
    in_memory = load_model(ModelConfig(path=str(TINY))).model
    apply_transform(in_memory, RotationConfig().build(in_memory))
    assert torch.equal(in_memory.model.layers[0].mlp.up_proj.weight, weight.half())


def test_a_filled_model_is_the_transformed_one_and_says_so() -> None:
    loaded = open_model(ModelConfig(path=str(TINY), dtype="float32"))
    blocks = rotated(loaded)
    expected = blockwise_logits(blocks, IDS)
    blocks.fill((), CPU, torch.float32)
    assert torch.equal(loaded.model(input_ids=IDS).logits, expected)
    assert torch.equal(blockwise_logits(blocks, IDS), expected)
    assert loaded.model.config.matquant_transform == RotationConfig().build(loaded.model).to_json()


def test_an_untied_head_stays_untied() -> None:
    model = load_model(ModelConfig(path=str(TINY), dtype="float32")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    apply_transform(model, RotationConfig().build(model))
    expected = model(input_ids=IDS).logits
    model.tie_weights()  # evaluation harnesses call it
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not model.config.tie_word_embeddings


def test_a_saved_transformed_model_loads_again(tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(TINY), dtype="float32")).model
    apply_transform(model, RotationConfig().build(model))
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(UserError, match="passed the transform rotation already"):
        apply_transform(again, RotationConfig().build(again))


SUPPORTED = {
    "llama": lambda: make_model("llama"),
    "mistral": lambda: make_model("mistral"),
    "qwen2": lambda: make_model("qwen2"),  # tied embeddings, biases of q, k and v
    "qwen3": lambda: make_model("qwen3"),  # norms of queries and keys
    "phi3": lambda: make_model("phi3"),  # fused projections
    "granite": lambda: make_model("granite"),  # factors on embeddings and residual branches
    "gemma": lambda: random_model(tf.GemmaConfig(**SIZES)),  # norms that multiply by 1 + weight, scaled embeddings
    "llama_bias": lambda: random_model(tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
}
REFUSED = {
    "opt": "outside of its blocks|not an RMSNorm|before the first block",
    "gpt2": "before the first block",
    "gpt_neox": "not an RMSNorm",
    "falcon": "not an RMSNorm",
    "gemma2": "no linear layer reads the output of model.layers.0.post_attention_layernorm",
    "olmo2": "no linear layer reads the output",
    "mixtral": "has experts",
    "deepseek_v3": "model.layers.1 has experts",
}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("kind", SUPPORTED)
def test_decoders_with_rms_norms_keep_their_logits(kind: str, tmp_path: Path) -> None:
    ids = IDS[:, :24] % 128
    model = SUPPORTED[kind]()
    save(model, tmp_path)
    expected = model(input_ids=ids).logits.detach()
    found = blockwise_logits(rotated(open_model(ModelConfig(path=str(tmp_path)))), ids)
    assert relative_difference(found, expected) < FLOAT32_ROUNDING
    apply_transform(model, ResidualRotation(64, "orthogonal"))
    assert relative_difference(model(input_ids=ids).logits, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused(kind: str) -> None:
    model = make_model(kind)
    with pytest.raises(
        UserError, match=f"(?s)does not support {type(model).__name__}.*({REFUSED[kind]}).*transform=none"
    ):
        BlockModel(model, transform=ResidualRotation(64))


def test_a_block_that_uses_its_hidden_states_in_another_way_is_refused() -> None:
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.abs()
    with pytest.raises(UserError, match="changes the output of model.layers.0"):
        BlockModel(model, transform=ResidualRotation(64))


def test_a_model_without_values_cannot_be_transformed_in_place() -> None:
    loaded = open_model(ModelConfig(path=str(TINY)))
    with pytest.raises(UserError, match="no values.*Load the model"):
        rotated(loaded).transform_in_place()


# Descriptions


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_description_rebuilds_the_transform(matrix: str) -> None:
    transform = ResidualRotation(64, matrix, seed=5)
    description = json.loads(json.dumps(transform.to_json()))
    assert description == transform.to_json()
    again = transform_from_json(description)
    assert isinstance(again, ResidualRotation)
    assert torch.equal(again.rotation, transform.rotation)
    assert ResidualRotation(64, matrix, seed=6).to_json()["sha256"] != description["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "shear"}, "no weight transform 'shear'"),
        ({"sha256": "0" * 64}, "differs from the parent's"),
        ({"matrix": "diagonal"}, "does not describe a rotation"),
        ({"seed": None}, "does not describe a rotation"),
    ],
)
def test_wrong_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transform_from_json(ResidualRotation(64).to_json() | change)


def test_a_rotation_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="hidden size of 32, the model has 64"):
        BlockModel(make_model("llama"), transform=ResidualRotation(32))


def test_a_hidden_size_without_a_hadamard_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="hidden size 92.*transform.matrix=orthogonal"):
        ResidualRotation(92)


def test_settings_build_the_transform() -> None:
    model = make_model("llama")
    assert TransformConfig().build(model) is None
    settings = {"_target_": f"{RotationConfig.__module__}.RotationConfig", "seed": 3, "matrix": "orthogonal"}
    config = build(TransformConfig, settings)
    assert config == RotationConfig(seed=3, matrix="orthogonal")
    assert config.build(model).to_json() == ResidualRotation(64, "orthogonal", 3).to_json()


# Parents and packed folders


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Tied float16 model whose rotated weights were rounded to nearest."""
    folder = tmp_path_factory.mktemp("model")
    save(make_model("qwen2", torch.float16), folder)
    return Opened(folder, tmp_path_factory.mktemp("store"), transform=RotationConfig(seed=1))


@pytest.fixture(scope="module")
def packed(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opened.pack(tmp_path_factory.mktemp("packed") / "folder")


def in_memory(opened: Opened) -> Any:
    """Original model, transformed and with the parent's layers."""
    model = load_model(opened.config).model
    assert opened.parent.transform is not None
    apply_transform(model, opened.parent.transform)
    replace_linears(model, opened.parent)
    return model.float()


def test_the_parent_records_its_transform(opened: Opened) -> None:
    assert opened.parent.transform == ResidualRotation(64, seed=1).to_json()


def test_a_packed_folder_gives_the_logits_of_the_parent(opened: Opened, packed: Path) -> None:
    model = in_memory(opened)
    loaded = read(packed)
    assert torch.equal(logits(loaded), logits(model))
    with safe_open(packed / "model-00001-of-00007.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= names
        assert torch.equal(file.get_tensor("model.norm.weight"), torch.ones(64, dtype=torch.float16))
        assert torch.equal(file.get_tensor("lm_head.weight").float(), model.lm_head.weight)


def test_the_config_of_a_packed_folder_unties_the_head_and_names_the_transform(opened: Opened, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["matquant_transform"] == opened.parent.transform


def test_the_parent_is_close_to_the_original_model(opened: Opened, packed: Path) -> None:
    original = load_model(opened.config).model.float()
    expected = logits(original)
    assert (logits(read(packed)) - expected).norm() < 0.05 * expected.norm()

    def weights_of(index: int, name: str) -> dict[str, Tensor]:
        weights = opened.parent.block(index) if index < len(opened.blocks) else {}
        return {layer: weight.dequantize(int(name)) for layer, weight in weights.items()}

    found = evaluate_slices(opened.blocks, IDS[:, :24] % 128, weights_of, ["8"], 1, "cpu")
    assert found["8"].kl < 1e-3


def test_layers_of_a_transformed_parent_need_a_transformed_model(opened: Opened) -> None:
    model = load_model(opened.config).model
    with pytest.raises(UserError, match=r"transform rotation.*apply_transform\(model, parent.transform\)"):
        replace_linears(model, opened.parent)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    apply_transform(model, RotationConfig(seed=2).build(model))
    with pytest.raises(UserError, match="'seed': 2.*'seed': 1"):
        replace_linears(model, opened.parent)


def test_layers_of_an_untransformed_parent_need_an_untransformed_model(tmp_path: Path) -> None:
    save(make_model("llama", torch.float16), tmp_path / "model")
    plain = Opened(tmp_path / "model", tmp_path / "store")
    assert plain.parent.transform is None
    assert "transform" not in plain.parent.artifact.about
    model = load_model(plain.config).model
    apply_transform(model, ResidualRotation(64))
    with pytest.raises(UserError, match="parent was made from original weights"):
        replace_linears(model, plain.parent)


def test_a_parent_is_not_packed_with_weights_of_another_transform(opened: Opened, tmp_path: Path) -> None:
    loaded = open_model(opened.config)
    other = Opened.__new__(Opened)
    other.__dict__ |= opened.__dict__ | {"loaded": loaded, "blocks": BlockModel(loaded.model, loaded.checkpoint)}
    with pytest.raises(ValueError, match="transform"):
        other.pack(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_saved_transformed_model_is_quantized_as_it_is(tmp_path: Path) -> None:
    model = make_model("llama", torch.float16)
    apply_transform(model, ResidualRotation(64))
    save(model, tmp_path / "model")
    again = Opened(tmp_path / "model", tmp_path / "store")
    assert again.parent.transform == ResidualRotation(64).to_json()
    folder = again.pack(tmp_path / "packed")
    assert json.loads((folder / "config.json").read_text())["matquant_transform"] == again.parent.transform
    loaded = load_model(again.config).model
    replace_linears(loaded, again.parent)
    assert torch.equal(logits(read(folder)), logits(loaded.float()))


def test_a_parent_with_a_quantized_head(tmp_path: Path) -> None:
    save(make_model("qwen2", torch.float16), tmp_path / "model")
    opened = Opened(tmp_path / "model", tmp_path / "store", head=True, transform=RotationConfig())
    assert "lm_head" in opened.names()
    folder = opened.pack(tmp_path / "packed")
    assert torch.equal(logits(read(folder)), logits(in_memory(opened)))
