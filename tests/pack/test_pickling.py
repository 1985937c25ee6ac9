"""Copies and pickles of models with nested layers: equal to the original, with bit-widths of their own."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from architectures import make_model, save
from packing import IDS, Opened, logits, read

from matquant.inference import nested_layers, set_bits

pytestmark = pytest.mark.slow


def through_torch(model: Any, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def through_joblib(model: Any, folder: Path) -> Any:
    joblib.dump(model, folder / "model.joblib")
    return joblib.load(folder / "model.joblib")


WAYS: list[Callable[[Any, Path], Any]] = [
    through_torch,
    through_joblib,
    lambda model, _: pickle.loads(pickle.dumps(model)),
    lambda model, _: copy.deepcopy(model),
]
WAY_IDS = ["torch", "joblib", "pickle", "deepcopy"]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def opened(request, tmp_path_factory) -> Opened:
    folder = tmp_path_factory.mktemp(request.param)
    return Opened(save(make_model(request.param), folder / "model"), folder / "store")


@pytest.fixture(scope="module")
def folder(opened, tmp_path_factory) -> Path:
    return opened.pack(tmp_path_factory.mktemp("packed") / "folder", widths=3)


@torch.no_grad()
def decode_logits(model: Any) -> torch.Tensor:
    """Logits of a step in which three sequences decode, after prompts that they share."""
    prompt = model(IDS.expand(3, -1), use_cache=True)
    return model(torch.tensor([[4], [90], [17]]), past_key_values=prompt.past_key_values).logits


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_copy_of_a_packed_model(folder, tmp_path, way):
    model = read(folder)
    model.set_bits(2, prefill=8)
    found = way(model, tmp_path)
    assert torch.equal(decode_logits(found), decode_logits(model))
    expected = {bits: logits(read(folder, bits=bits)) for bits in (2, 3, 8)}
    found.set_bits(2)
    model.set_bits(8)
    assert torch.equal(logits(found), expected[2])  # each changes its own bits only
    assert torch.equal(logits(model), expected[8])
    found.set_bits(3)
    found.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(read(tmp_path / "saved")), expected[3])
    again = way(found, tmp_path)  # a copy of a copy
    assert set(again.set_bits(2).values()) == {2}
    assert torch.equal(logits(again), expected[2])


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_copy_of_a_model_with_replaced_layers(opened, tmp_path, way):
    model = opened.in_memory()
    set_bits(model, 2, prefill=8)
    found = way(model, tmp_path)
    assert torch.equal(decode_logits(found), decode_logits(model))
    set_bits(found, 3)
    assert {layer.bits for layer in nested_layers(model).values()} == {2}
    set_bits(model, 3)
    assert torch.equal(logits(found), logits(model))
