"""Every architecture: found, read block by block, quantized, measured, kept in a store, and the same from there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, VOCABULARY, make_model, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.config import ModelConfig
from matquant.evaluate.slices import FULL, evaluate_slices
from matquant.models.blocks import BlockModel
from matquant.models.load import LoadedModel, load, open_model
from matquant.quantize.driver import CalibrationOptions, Driver, layers_to_quantize
from matquant.quantize.parent import Parent
from matquant.quantize.solver import SolverOptions
from matquant.store import Store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(folder: Path) -> ModelConfig:
    return ModelConfig(label=None, name=None, path=str(folder), revision=None, dtype="auto", trust_remote_code=False)


def windows_of(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def quantize(blocks: BlockModel, folder: Path) -> Parent:
    options = SolverOptions(weights={2: 1.0, 8: 64.0}, group_size=32, block_size=32)
    calibration = CalibrationOptions(streams=(2, 8), asymmetric=True, staged=True, batch_size=4)
    layers = layers_to_quantize(blocks, lambda _: False, head=False)
    driver = Driver(blocks, layers, options, calibration, device=CPU, dtype=torch.float32)
    build = lambda draft: {"label": "parent", "blocks": driver.run(draft, windows_of(8, 24, 1))}  # noqa: E731
    return Parent(Store(folder).open_or_build("parent", {}, build))


def with_slice(loaded: LoadedModel, parent: Parent, bits: int) -> Any:
    """The model in memory, its quantized layers replaced by a slice."""
    blocks = BlockModel(loaded.model)
    for index in range(len(blocks)):
        layers = blocks.linears(index)
        for name, weight in parent.block(index).items():
            layers[name].weight = torch.nn.Parameter(weight.decode(bits), requires_grad=False)
    return loaded.model


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantize_evaluate_save_load(kind: str, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model", shard="100KB")
    ids = windows_of(3, 16, 2)
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits

    opened = open_model(config(folder))
    streamed = BlockModel(opened.model, opened.checkpoint)
    streamed.check()
    parent = quantize(streamed, tmp_path / "streamed")
    in_memory = load(config(folder))
    torch.testing.assert_close(in_memory.model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert quantize(BlockModel(in_memory.model), tmp_path / "memory").artifact.sha256 == parent.artifact.sha256

    def weights_of(index: int, bits: str) -> Mapping[str, Tensor]:
        weights = parent.block(index) if index < len(streamed) else {}
        return {name: w.decode(int(bits)) for name, w in weights.items()}

    found = evaluate_slices(streamed, ids, weights_of, ["2", "8"], 2, "cpu")
    assert found[FULL].kl == 0 < found["8"].kl < found["2"].kl
    assert found["8"].kl < 0.01
    assert all(tensor.is_meta for block in streamed.blocks for tensor in block.parameters())

    for bits in (2, 8):
        logits = with_slice(load(config(folder)), parent, bits)(input_ids=ids).logits
        full, cut = (x[:, :-1].double().log_softmax(-1) for x in (expected, logits))
        kl = (full.exp() * (full - cut)).sum(-1).mean().item()
        assert found[str(bits)].kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
