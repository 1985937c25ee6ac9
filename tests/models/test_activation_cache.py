"""Hidden states on a device, in memory and in a file."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import gptq
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from matquant import machine
from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices
from matquant.formats.parent import Parent
from matquant.models.activation_cache import ActivationCache, OffloadTarget, choose_offload_target
from matquant.models.blocks import BlockModel
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layer_selection import layers_to_quantize
from matquant.store import Store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blocks() -> BlockModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return BlockModel(LlamaForCausalLM(config).eval().requires_grad_(False))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_written_hidden_states_are_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    both = [ActivationCache(shape, dtype, target, CPU) for target in (CPU, folder)]
    for states in both:
        states[0 : shape[0]] = torch.zeros(shape, dtype=dtype)
    for number in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, shape[0] - 1))
        rows = slice(start, data.draw(st.integers(start + 1, shape[0])))
        values = torch.randn((rows.stop - rows.start, *shape[1:]), generator=torch.Generator().manual_seed(number))
        for states in both:
            states[rows] = values.to(dtype)
    copies = [states.clone() for states in both]
    both[1][0:1] = torch.ones((1, *shape[1:]), dtype=dtype)  # a later write does not change a copy
    assert torch.equal(copies[0][0 : shape[0]], copies[1][0 : shape[0]])
    assert torch.equal(both[0][1 : shape[0]], both[1][1 : shape[0]])
    assert not list(folder.iterdir())  # the file has no name: a crash leaves nothing behind


def test_the_fastest_target_with_enough_memory_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 1000, "cpu": 2000}
    monkeypatch.setattr(machine, "device_free", lambda device: free[device.type])
    gpu = torch.device("cuda")
    assert [choose_offload_target(needed, gpu, tmp_path) for needed in (300, 1500, 1700)] == [gpu, CPU, tmp_path]
    assert [choose_offload_target(needed, CPU, tmp_path) for needed in (700, 900)] == [CPU, tmp_path]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        ActivationCache((1, 2, 3), torch.float32, tmp_path / "file" / "scratch", CPU)


def test_stored_hidden_states_have_no_gradient() -> None:
    cache = ActivationCache((2, 1, 3), torch.float32, CPU, CPU)
    cache[0:2] = torch.ones(2, 1, 3, requires_grad=True) * 2
    assert not cache[0:2].requires_grad
    assert (cache[0:2] == 2).all()


def quantize(blocks: BlockModel, sequences: Tensor, offload: OffloadTarget, folder: Path) -> Parent:
    driver = BlockwiseQuantizer(
        blocks,
        layers_to_quantize(blocks, lambda _: False, lm_head=False),
        gptq({2: 1.0, 8: 64.0}),
        device=CPU,
        dtype=torch.float32,
        batch_size=2,
        offload=offload,
    )
    build = lambda draft: {"blocks": driver.run(draft, sequences)}  # noqa: E731
    return Parent(Store(folder).open_or_build("parent", {}, build))


def test_hidden_states_in_a_file_give_the_same_parent_and_metrics(blocks: BlockModel, tmp_path: Path) -> None:
    sequences = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(1))
    in_memory = quantize(blocks, sequences, CPU, tmp_path / "memory")
    in_a_file = quantize(blocks, sequences, tmp_path / "scratch", tmp_path / "file")
    assert in_a_file.artifact.sha256 == in_memory.artifact.sha256

    def weights_of(index: int, bits: str) -> dict[str, Tensor]:
        weights = in_memory.block(index) if index < len(blocks) else {}
        return {name: weight.dequantize(int(bits)) for name, weight in weights.items()}

    found = [
        evaluate_slices(blocks, sequences, weights_of, ["2", "8"], 2, CPU, place=target)
        for target in (CPU, tmp_path / "scratch")
    ]
    assert found[0] == found[1]
