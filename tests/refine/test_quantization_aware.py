"""MatQuant on QAT: gradients of the published loss against plain autograd, training, resumption, refusals."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import Opened
from torch import Tensor
from torch.nn import functional as F

from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel
from matquant.refine.config import RefineConfig
from matquant.refine.quantization_aware import QuantizationAwareTraining, rate_at
from matquant.refine.refinement import RefineContext
from matquant.refine.slice_model import open_slice_model
from matquant.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 120, (14, 12), generator=torch.Generator().manual_seed(0))
LAMBDAS = {2: 1.0, 4: 0.1, 8: 0.1}
CONFIG = RefineConfig(method="qat", bits=(2, 4, 8), steps=16, learning_rate=3e-3, warmup_steps=2, validate_every=8)
ROUND = {"slicing": "round", "scale": "minmax", "symmetric": False}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("opened")
    return Opened(save(make_model("llama"), folder / "model"), folder / "store", **ROUND)


def training_of(opened: Opened, config: RefineConfig = CONFIG, **changes: Any) -> QuantizationAwareTraining:
    fields: dict[str, Any] = {"blocks": opened.blocks, "parent": opened.parent, "windows": WINDOWS[:10]}
    fields |= {"validation": WINDOWS[10:], "batch_size": 2, "device": CPU, "dtype": torch.float32, "lambdas": LAMBDAS}
    return QuantizationAwareTraining(config, RefineContext(**fields | changes))


def train(opened: Opened, store: Path, config: RefineConfig = CONFIG, **changes: Any) -> tuple[Parent, list[dict]]:
    """Trained parent and the history of its validations."""
    training = training_of(opened, config, **changes)

    def build(draft: Any) -> dict[str, Any]:
        return {"blocks": training.run(draft), "history": training.history}

    parent = Parent(Store(store).open_or_build("refined", {"seed": config.seed}, build))
    return parent, parent.artifact.about["history"]


def fake_quantized(weight: Tensor, bits: int, group_size: int = 32) -> Tensor:
    """Slice of a weight whose gradient is the weight's, but for codes that a clamp moved."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(2, keepdim=True).clamp(max=0).detach(), groups.amax(2, keepdim=True).clamp(min=0).detach()
    scale = ((high - low) / 255).half().float()
    zero = (-low / scale + 0.5).floor().clamp(0, 255)
    code = ((groups.detach() / scale + zero + 0.5).floor()).clamp(0, 255)
    kept = (code / 2 ** (8 - bits) + 0.5).floor()
    moved = (kept > 2**bits - 1) | ((groups.detach() / scale + zero + 0.5).floor() != code)
    value = scale * (kept.clamp(max=2**bits - 1) * 2 ** (8 - bits) - zero)
    return (value + (groups - groups.detach()) * ~moved).flatten(1)


def log_probs(model: torch.nn.Module, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    return torch.func.functional_call(model, named, (ids,), tie_weights=False).logits[:, :-1].log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "head"), [("llama", False), ("gpt2", False), ("gpt2", True), ("mixtral", False)], ids=str
)
@pytest.mark.parametrize(
    ("distillation", "text", "wide"),
    [
        ({}, (8, 4, 2), ()),
        ({"distilled_bits": (2,)}, (8, 4, 2), (2,)),
        ({"distilled_bits": (2, 4), "distill_only": True}, (8,), (2, 4)),
    ],
    ids=str,
)
def test_gradients_are_those_of_a_dense_model(
    kind: str, distillation: dict, text: tuple, wide: tuple, head: bool, tmp_path: Path
) -> None:
    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store", head=head, **ROUND)
    training = training_of(opened, dataclasses.replace(CONFIG, **distillation))
    weights = {n: w for i in range(len(opened.parent.blocks)) for n, w in opened.parent.block(i).items()}
    with open_slice_model(opened.blocks, weights, WINDOWS[:3], 3, CPU, torch.float32, training.linear) as model:
        training.start(model)
        losses, gradients = training.losses_and_gradients(model, 0)
    dense, ids = BlockModel(make_model(kind)).model, WINDOWS[:3]
    latents = {name: latent.detach().clone().requires_grad_() for name, latent in training.latents.items()}
    predictions = {b: log_probs(dense, {n: fake_quantized(w, b) for n, w in latents.items()}, ids) for b in (8, 4, 2)}
    expected = {bits: torch.zeros(()) for bits in predictions}
    for bits in text:
        expected[bits] = expected[bits] + LAMBDAS[bits] * F.nll_loss(
            predictions[bits].flatten(0, 1), ids[:, 1:].flatten()
        )
    for bits in wide:
        target = predictions[8].detach()
        expected[bits] = expected[bits] + LAMBDAS[bits] * (target.exp() * (target - predictions[bits])).sum(-1).mean()
    torch.stack(list(expected.values())).sum().backward()
    assert losses == {bits: pytest.approx(loss.item(), rel=1e-3, abs=1e-6) for bits, loss in expected.items()}
    for name, latent in training.latents.items():
        assert torch.equal(latents[name], latent)
        if name not in gradients:  # an expert without tokens
            assert latents[name].grad is None or not latents[name].grad.any()
            continue
        torch.testing.assert_close(gradients[name], latents[name].grad, rtol=2e-3, atol=2e-5)


def test_training_begins_at_the_full_precision_weights_and_learns_the_text(opened: Opened, tmp_path: Path) -> None:
    parent, history = train(opened, tmp_path, validation=WINDOWS[:4])  # what is learned by heart shows on its own text
    assert [row["step"] for row in history] == [0, 8, 16]
    model = make_model("llama")

    def text_loss(source: Parent, bits: int) -> float:
        weights = {n: w.dequantize(bits) for i in range(len(source.blocks)) for n, w in source.block(i).items()}
        return F.nll_loss(log_probs(model, weights, WINDOWS[:10]).flatten(0, 1), WINDOWS[:10, 1:].flatten()).item()

    for bits in (2, 4, 8):
        assert text_loss(parent, bits) < text_loss(opened.parent, bits) - 0.05
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            before = opened.parent.block(index)[name]
            assert weight.format == before.format
            assert not torch.equal(weight.codes, before.codes)


def test_no_step_leaves_min_max_codes_of_the_weights(opened: Opened, tmp_path: Path) -> None:
    """The first validation reads what the rounded parent reads."""
    still = dataclasses.replace(CONFIG, learning_rate=1e-12, steps=1)
    parent, history = train(opened, tmp_path, still)
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            assert (weight.codes.int() - opened.parent.block(index)[name].codes.int()).abs().max() <= 1
    assert history[0]["kl"] == {bits: pytest.approx(kl, rel=1e-3) for bits, kl in history[1]["kl"].items()}


def test_a_killed_training_goes_on_with_the_same_bytes(opened: Opened, tmp_path: Path) -> None:
    whole, history = train(opened, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killing(step: int) -> None:
        taken.append(step)
        if sum(taken) == 11:
            raise Killed

    taken: list[int] = []
    with pytest.raises(Killed):
        train(opened, tmp_path / "resumed", progress=killing)
    steps: list[int] = []
    resumed, resumed_history = train(opened, tmp_path / "resumed", progress=steps.append)
    assert steps[0] == 8
    assert resumed_history == history
    assert resumed.artifact.sha256 == whole.artifact.sha256
    assert not list(resumed.artifact.path.glob("training*"))


@pytest.mark.parametrize("rate", [1e20, 1e30])
def test_a_training_that_diverges_is_refused(opened: Opened, tmp_path: Path, rate: float) -> None:
    wild = dataclasses.replace(CONFIG, learning_rate=rate, warmup_steps=0)
    with pytest.raises(UserError, match="is not finite at step"):
        train(opened, tmp_path, wild)


def test_the_learning_rate_warms_up_linearly_and_falls_to_zero() -> None:
    config = dataclasses.replace(CONFIG, steps=110, warmup_steps=10)
    rates = [rate_at(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distilled_bits": (8,)}, "only those below 8"),
        ({"distilled_bits": (3,)}, "names 3, which refine.bits"),
        ({"distill_only": True}, "needs refine.distilled_bits"),
        ({"method": "scales", "distilled_bits": (2,)}, "are for refine.method=qat"),
        ({"method": "scales", "distill_only": True}, "are for refine.method=qat"),
        ({}, "choose the preset refine=qat"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **changes).check(8)
