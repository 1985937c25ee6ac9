"""Text that a model writes itself: where it begins, what it draws from, and what stays as it was."""

import dataclasses

import pytest
import torch
from architectures import make_model, save
from packing import Opened

from matquant.data.config import TextConfig
from matquant.errors import UserError
from matquant.refine.self_text import check_generates, sample_windows

CPU = torch.device("cpu")
TEXT = TextConfig(dataset="self", sequences=5, sequence_length=9, seed=3)


class Tokenizer:
    """Tokenizer of 120 tokens, of which the first three are special."""

    all_special_ids = (0, 1, 2)

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __len__(self) -> int:
        return 120

    def __call__(self, text: str) -> dict:
        return {"input_ids": [7] if self.bos_token_id is None else [self.bos_token_id, 7]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    return Opened(save(make_model("llama"), folder / "model"), folder / "store")


def sample(opened, text=TEXT, top_k=50, bos=1, dtype=torch.float32):
    return sample_windows(opened.blocks, Tokenizer(bos), text, top_k, CPU, dtype)


@pytest.mark.parametrize("bos", [None, 1])
def test_sequences_begin_with_a_random_token_and_go_on_to_their_end(opened, bos):
    counts = []
    text = dataclasses.replace(TEXT, sequences=70)
    windows = sample_windows(opened.blocks, Tokenizer(bos), text, 50, CPU, torch.float32, counts.append)
    assert (windows.shape, windows.dtype) == ((70, 9), torch.int64)
    assert counts == [64, 6]
    first = windows[:, 0 if bos is None else 1]
    assert bos is None or (windows[:, 0] == bos).all()
    assert 3 <= first.min() < first.max() < 120
    assert len(first.unique()) > 20


def test_tokens_are_drawn_from_the_most_likely_ones(opened):
    model = make_model("llama")
    windows = sample(opened, top_k=3)
    ranks = model(windows).logits[:, 1:-1].argsort(-1, descending=True)
    assert (ranks[..., :3] == windows[:, 2:, None]).any(-1).all()
    assert not (ranks[..., 0] == windows[:, 2:]).all()
    greedy = sample(opened, top_k=1)
    assert torch.equal(model(greedy).logits[:, 1:-1].argmax(-1), greedy[:, 2:])


def test_the_seed_decides_and_the_generator_of_the_process_does_not_move(opened):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    windows = sample(opened)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(sample(opened), windows)
    assert not torch.equal(sample(opened, dataclasses.replace(TEXT, seed=4)), windows)


def test_settings_of_the_checkpoint_do_not_shape_the_text(opened):
    windows = sample(opened)
    model = opened.blocks.model
    kept = model.generation_config
    kept.repetition_penalty, kept.max_length = 30.0, 4
    try:
        assert torch.equal(sample(opened), windows)
        assert model.generation_config is kept
    finally:
        kept.repetition_penalty, kept.max_length = 1.0, 20


def test_a_model_that_cannot_generate_is_refused_in_a_sentence(opened, monkeypatch):
    model = opened.blocks.model
    check_generates(model)
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda _: False))
    with pytest.raises(UserError, match="needs a model that generates text, and LlamaForCausalLM does not"):
        check_generates(model)
