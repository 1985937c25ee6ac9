"""Packed checkpoints in models with other heads than the one that was packed: as unquantized checkpoints load."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import make_model, save
from packing import IDS, Opened, read
from torch import Tensor

from matquant.errors import UserError
from matquant.inference import nested_layers

pytestmark = pytest.mark.slow

HEADS = [
    ("llama", tf.AutoModel, set()),
    ("llama", tf.AutoModelForSequenceClassification, {"score.weight"}),
    ("llama", tf.AutoModelForTokenClassification, {"score.weight", "score.bias"}),
    ("gpt2", tf.AutoModel, set()),
    ("gpt2", tf.AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
    ("opt", tf.AutoModelForSequenceClassification, {"score.weight"}),
    ("qwen3_moe", tf.AutoModelForTokenClassification, {"score.weight", "score.bias"}),
    ("gemma3", tf.AutoModel, set()),
    ("gemma3", tf.AutoModelForImageTextToText, set()),
    ("mamba", tf.AutoModel, set()),
]


@torch.no_grad()
def first_output(model: Any) -> Tensor:
    return model(input_ids=IDS)[0]


def with_weights_of(model: Any, packed: Any) -> Any:
    """The unquantized model with the weights that the nested layers of a packed one dequantize to."""
    tensors = {name: tensor for name, tensor in packed.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(tensors, strict=False)
    for name, layer in nested_layers(packed).items():
        dense = model.get_submodule(name)
        weight = layer.weight + 0
        dense.weight.data = weight.t().contiguous() if type(dense).__name__ == "Conv1D" else weight
    return model


@pytest.mark.parametrize(("kind", "auto", "new"), HEADS, ids=lambda value: getattr(value, "__name__", None))
def test_other_heads_load_as_from_an_unquantized_folder(kind: str, auto: Any, new: set[str], tmp_path: Path) -> None:
    original = save(make_model(kind), tmp_path / "model")
    head = kind == "llama"
    folder = Opened(original, tmp_path / "store", head=head).pack(tmp_path / "packed")
    plain, expected = auto.from_pretrained(original, dtype=torch.float32, output_loading_info=True)
    model, found = auto.from_pretrained(folder, bits=3, dtype=torch.float32, output_loading_info=True)
    assert type(model) is type(plain)
    assert found["missing_keys"] == expected["missing_keys"] == new
    assert {name.partition(".")[0] for name in found["unexpected_keys"]} == {
        name.partition(".")[0] for name in expected["unexpected_keys"]
    }
    assert len(nested_layers(model)) == len(nested_layers(read(folder))) - head
    assert {layer.bits for layer in nested_layers(model).values()} == {3}
    if kind != "qwen3_moe":  # whose experts are split
        torch.testing.assert_close(first_output(model), first_output(with_weights_of(plain, model)))
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(first_output(again), first_output(model))


def test_a_base_model_that_was_saved_gets_its_head_back_where_it_is_tied(tmp_path: Path) -> None:
    folder = Opened(save(make_model("qwen2"), tmp_path / "model"), tmp_path / "store").pack(tmp_path / "packed")
    tf.AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "base")
    assert torch.equal(first_output(read(tmp_path / "base")), first_output(read(folder)))
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert set(nested_layers(classifier)) == set(nested_layers(read(folder)))


def test_a_head_that_is_missing_is_refused_for_a_language_model(tmp_path: Path) -> None:
    folder = Opened(save(make_model("llama"), tmp_path / "model"), tmp_path / "store").pack(tmp_path / "packed")
    tf.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"lacks 1 tensors that the model needs: lm_head.weight. They would be random"):
        read(tmp_path / "base")


def test_bits_by_layer_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    folder = Opened(save(make_model("llama"), tmp_path / "model"), tmp_path / "store").pack(tmp_path / "packed")
    model = tf.AutoModel.from_pretrained(folder, bits={"model.layers.1.mlp.up_proj": 2})
    bits = {name: layer.bits for name, layer in nested_layers(model).items()}
    assert {name for name, value in bits.items() if value == 2} == {"layers.1.mlp.up_proj"}
    model.set_bits({"layers.0.mlp.up_proj": 5})
    assert nested_layers(model)["layers.0.mlp.up_proj"].bits == 5
