import math
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from matquant.errors import UserError
from matquant.evaluate import slices
from matquant.evaluate.metrics import Metrics
from matquant.evaluate.slices import FULL, evaluate_slices, steps
from matquant.models.blocks import BlockModel
from matquant.paths import resource_root

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> BlockModel:
    torch.manual_seed(0)
    config = {
        "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
        "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=5, final_logit_softcapping=2.0),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return BlockModel(model.to(dtype).eval().requires_grad_(False))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(1))


class Noise:
    """Slices are weights with noise of a size by name; the layer ``skip`` is left out."""

    def __init__(self, blocks: BlockModel, skip: str = "") -> None:
        self.skip = skip
        self.weights = [{n: m.weight.clone() for n, m in blocks.linears(i).items()} for i in range(len(blocks))]
        self.weights.append({})  # the head stays as it is
        self.asked: list[tuple[int, str]] = []

    def __call__(self, index: int, variant: str) -> Mapping[str, Tensor]:
        self.asked.append((index, variant))
        generator = torch.Generator().manual_seed(index)
        noisy = {}
        for name, weight in self.weights[index].items():
            noise = torch.randn(weight.shape, generator=generator)
            if not self.skip or not name.endswith(self.skip):
                noisy[name] = (weight.float() + noise * float(variant)).to(weight.dtype)
        return noisy


def direct(blocks: BlockModel, windows: Tensor, weights: list[Mapping[str, Tensor]]) -> tuple[float, Tensor]:
    """Mean loss and logits of the whole model in float32 with these weights."""
    model: Any = blocks.model
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtype = model.dtype
    for block in weights:
        for name, weight in block.items():
            model.get_submodule(name).weight.data.copy_(weight)
    model.float()
    with torch.no_grad():
        output = model(input_ids=windows, labels=windows)
    model.to(dtype).load_state_dict(held)
    return output.loss.item(), output.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_figures_are_those_of_whole_models(kind: str, dtype: torch.dtype, windows: Tensor) -> None:
    blocks = make(kind, dtype)
    noise = Noise(blocks, skip="down_proj")
    found = evaluate_slices(blocks, windows, noise, ["0.01", "0.1"], 2, "cpu")
    full_loss, full = direct(blocks, windows, [])
    assert list(found) == [FULL, "0.01", "0.1"]
    assert found[FULL] == Metrics(found[FULL].perplexity, 0.0, 1.0, 55)
    assert found[FULL].perplexity == pytest.approx(math.exp(full_loss), rel=1e-5)
    for variant in ("0.01", "0.1"):
        loss, logits = direct(blocks, windows, [noise(i, variant) for i in range(3)])
        expected, other = (x[:, :-1].double().log_softmax(-1) for x in (full, logits))
        kl = kl_div(other, expected, log_target=True, reduction="sum").item() / 55
        agreement = (full[:, :-1].argmax(-1) == logits[:, :-1].argmax(-1)).double().mean().item()
        metrics = found[variant]
        assert metrics.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert metrics.kl == pytest.approx(kl, rel=1e-4)
        assert metrics.top1_agreement == pytest.approx(agreement)
        assert metrics.kl > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_weights_do_not_diverge(dtype: torch.dtype, windows: Tensor) -> None:
    blocks = make(dtype=dtype)
    found = evaluate_slices(blocks, windows, Noise(blocks), ["0"], 2, "cpu")
    assert found["0"] == found[FULL]
    assert found["0"].kl == 0.0


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float16, 1e-9, 1e-4), (torch.bfloat16, 1e-7, 5e-3)])
def test_rounded_activations_move_figures_by_their_floor(dtype, least, most, windows: Tensor) -> None:
    blocks = make()
    exact, rounded = (
        evaluate_slices(blocks, windows, Noise(blocks), ["0.01"], 2, "cpu", dtype=one) for one in (torch.float32, dtype)
    )
    assert rounded[FULL] != exact[FULL]
    assert least < abs(rounded["0.01"].kl - exact["0.01"].kl) < most


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_batch_size_does_not_matter(kind: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make(kind)
    expected = evaluate_slices(blocks, windows, Noise(blocks), ["0.05"], 5, "cpu")
    for batch_size in (1, 2, 3, 100):
        if batch_size == 3:  # with a head that takes one window at a time
            monkeypatch.setattr(slices, "LOGITS_AT_ONCE", 1)
        found = evaluate_slices(blocks, windows, Noise(blocks), ["0.05"], batch_size, "cpu")
        for name, metrics in expected.items():
            assert found[name].perplexity == pytest.approx(metrics.perplexity, rel=1e-5)
            assert found[name].kl == pytest.approx(metrics.kl, rel=1e-5)
            assert found[name].tokens == metrics.tokens


def test_weights_are_given_back_to_the_bit(windows: Tensor) -> None:
    blocks = make(dtype=torch.float16)
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in blocks.model.named_parameters()}
    evaluate_slices(blocks, windows, Noise(blocks), ["0.1"], 2, "cpu")
    for name, parameter in blocks.model.named_parameters():
        pointer, version, value = before[name]
        assert (parameter.data_ptr(), parameter._version) == (pointer, version)
        assert torch.equal(parameter, value)


def test_only_one_block_at_a_time_is_converted(windows: Tensor) -> None:
    blocks = make(dtype=torch.float16)

    def weights_of(index: int, _: str) -> Mapping[str, Tensor]:
        for i, block in enumerate(blocks.blocks):
            dtype = torch.float32 if i == index else torch.float16
            assert {p.dtype for p in block.parameters()} == {dtype}
        assert blocks.model.get_input_embeddings().weight.dtype == torch.float16
        return {}

    evaluate_slices(blocks, windows, weights_of, ["a"], 2, "cpu")


def test_weights_are_asked_for_once_and_block_by_block(windows: Tensor) -> None:
    blocks = make()
    noise = Noise(blocks)
    evaluate_slices(blocks, windows, noise, ["0", "1"], 2, "cpu")
    assert noise.asked == [(index, variant) for index in range(3 + 1) for variant in ("0", "1")]


def test_a_tied_head_can_have_weights_of_its_own(windows: Tensor) -> None:
    blocks = make()
    embeddings = blocks.model.get_input_embeddings().weight.clone()
    (name,) = blocks.linears(len(blocks))

    def weights_of(index: int, variant: str) -> Mapping[str, Tensor]:
        return {name: embeddings * float(variant)} if index == len(blocks) else {}

    measured = evaluate_slices(blocks, windows, weights_of, ["1", "2"], 2, "cpu")
    assert measured["1"].kl == 0
    logits = blocks.model(input_ids=windows).logits
    expected = torch.nn.functional.kl_div(
        (2 * logits).log_softmax(-1)[:, :-1], logits.log_softmax(-1)[:, :-1], reduction="sum", log_target=True
    )
    assert measured["2"].kl == pytest.approx(expected.item() / windows[:, 1:].numel(), rel=1e-4)
    assert torch.equal(blocks.model.get_input_embeddings().weight, embeddings)


def test_progress_reaches_the_number_of_steps(windows: Tensor) -> None:
    blocks = make()
    done: list[int] = []
    evaluate_slices(blocks, windows, Noise(blocks), ["0", "1"], 2, "cpu", progress=done.append)
    assert sum(done) == steps(blocks, windows, ["0", "1"]) == 4 * 3 * 5


def test_no_slices_and_wrong_names(windows: Tensor) -> None:
    blocks = make()
    assert list(evaluate_slices(blocks, windows, Noise(blocks), [], 2, "cpu")) == [FULL]
    for names in (["full"], ["1", "1"]):
        with pytest.raises(ValueError, match="slices need different names"):
            evaluate_slices(blocks, windows, Noise(blocks), names, 2, "cpu")
    with pytest.raises(ValueError, match="is not a linear layer of"):
        evaluate_slices(blocks, windows, lambda *_: {"nothing": torch.ones(1)}, ["1"], 2, "cpu")


def test_the_model_that_ships_with_the_project() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        resource_root() / "experiments" / "models" / "tiny", dtype="auto"
    ).eval()
    windows = torch.randint(2048, (2, 96), generator=torch.Generator().manual_seed(0))
    found = evaluate_slices(BlockModel(model), windows, lambda *_: {}, ["same"], 2, "cpu")
    with torch.no_grad():
        loss = model.float()(input_ids=windows, labels=windows).loss.item()
    assert found[FULL].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["same"] == found[FULL]


def test_the_weights_of_one_variant_live_at_a_time(windows: Tensor) -> None:
    blocks = make()
    made: list[weakref.ref] = []

    def weights_of(index: int, _: str) -> dict[str, Tensor]:
        assert not any(reference() is not None for reference in made)
        if index == len(blocks):
            return {}
        weights = {name: layer.weight * 1.01 for name, layer in blocks.linears(index).items()}
        made[:] = [weakref.ref(weight) for weight in weights.values()]
        return weights

    evaluate_slices(blocks, windows, weights_of, ["2", "3", "4"], 2, "cpu")
    assert made


@pytest.mark.parametrize(("layer", "value"), [("mlp.down_proj", math.nan), ("self_attn.v_proj", math.inf)])
def test_a_slice_whose_hidden_states_are_not_finite_is_named_with_the_block(
    layer: str, value: float, windows: Tensor
) -> None:
    blocks = make()

    def weights_of(index: int, variant: str) -> Mapping[str, Tensor]:
        if (index, variant) != (1, "3"):
            return {}
        name = f"model.layers.1.{layer}"
        return {name: torch.full_like(blocks.linears(1)[name].weight, value)}

    with pytest.raises(UserError, match=r"outputs of model\.layers\.1 in the slice of 3 bits hold NaN or Inf"):
        evaluate_slices(blocks, windows, weights_of, ["2", "3"], 2, "cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_named_with_the_model(value: float, windows: Tensor) -> None:
    blocks = make()
    (name,) = blocks.linears(len(blocks))
    head = blocks.model.get_output_embeddings().weight.clone()
    head[5] = value

    def weights_of(index: int, variant: str) -> Mapping[str, Tensor]:
        return {name: head} if index == len(blocks) and variant == "a.yaml" else {}

    with pytest.raises(UserError, match=r"perplexity of the slice a\.yaml is (nan|inf)"):
        evaluate_slices(blocks, windows, weights_of, ["2", "a.yaml"], 2, "cpu")
    blocks.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="perplexity of the full-precision model is nan"):
        evaluate_slices(blocks, windows, lambda *_: {}, ["2"], 2, "cpu")


def test_a_perplexity_that_overflows_is_refused(windows: Tensor) -> None:
    blocks = make()
    (name,) = blocks.linears(len(blocks))
    far = {name: 1e6 * blocks.model.get_output_embeddings().weight}
    with pytest.raises(UserError, match="perplexity of the slice of 2 bits is inf"):
        evaluate_slices(blocks, windows, lambda index, _: far if index == len(blocks) else {}, ["2"], 2, "cpu")
