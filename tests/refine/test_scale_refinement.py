"""Refined scales: trained on the KL divergence, never worse than before, resumable with the same bytes."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import Opened
from refining import CPU, WINDOWS, context_of, refine

from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices
from matquant.formats.parent import Parent
from matquant.formats.slice_spec import SliceSpec
from matquant.models.blocks import BlockModel
from matquant.refine import slice_model
from matquant.refine.config import RefineConfig
from matquant.refine.scale_refinement import ScaleRefinement
from matquant.refine.slice_model import SliceModel, open_slice_model
from matquant.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CONFIG = RefineConfig(method="scales", bits=(2, 3), steps=24, learning_rate=0.03, warmup_steps=2, validate_every=8)


def divergences(opened: Opened, parent: Parent, windows: torch.Tensor) -> Mapping[str, float]:
    """KL of each bit-width as the stage evaluate measures it."""
    slices = {str(bits): SliceSpec(name=str(bits), parent=parent, bits=bits) for bits in (2, 3, 4, 6, 8)}
    found = evaluate_slices(opened.blocks, windows, lambda i, name: slices[name].weights(i), list(slices), 2, "cpu")
    return {name: metrics.kl for name, metrics in found.items() if name != "full"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("head", [False, True])
def test_divergence_and_gradients_are_those_of_a_dense_model(kind: str, head: bool, tmp_path: Path) -> None:
    if head and kind == "mixtral":
        pytest.skip("the same head as that of llama")
    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store", head=head)
    weights = {n: w for i in range(len(opened.parent.blocks)) for n, w in opened.parent.block(i).items()}
    model, ids = BlockModel(make_model(kind)).model, WINDOWS[:3]
    with open_slice_model(opened.blocks, weights, ids, 3, CPU, torch.float32) as slices:
        scales = {name: weight.scales.float().requires_grad_() for name, weight in weights.items()}
        full = slices.hidden(0)
        loss, gradients = slices.gradients(0, full, 2, scales)
        assert slices.divergence(0, full, 2, scales) == pytest.approx(loss, rel=1e-5)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].double().log_softmax(-1)
    own = {name: weight.scales.float().requires_grad_() for name, weight in weights.items()}
    dense = {
        f"{name}.weight": weight.format.levels(2)[weight.codes.int()]
        .sub(weight.format.zero_point)
        .unflatten(1, (-1, weight.format.group_size))
        .mul(own[name][:, :, None])
        .flatten(1)
        for name, weight in weights.items()
    }
    found = torch.func.functional_call(model, dense, (ids,), tie_weights=False).logits[:, :-1].double().log_softmax(-1)
    reference = (expected.exp() * (expected - found)).sum(-1).mean()
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-4)
    for name in scales:
        if own[name].grad is None or not own[name].grad.any():
            assert name not in gradients or not gradients[name].any()  # an expert without tokens
            continue
        torch.testing.assert_close(gradients[name], own[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("error", "reason"), [("a block\nwaits", "a block"), ("", "RuntimeError")])
def test_a_refinement_says_that_it_ran_without_graphs(
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    error: str,
    reason: str,
) -> None:
    class Refusal:
        def __init__(self, *_: Any) -> None:
            raise RuntimeError(error)

    class Capturing(SliceModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._captures = True  # as on a GPU

    monkeypatch.setattr(slice_model, "GraphedPasses", Refusal)
    monkeypatch.setattr(slice_model, "SliceModel", Capturing)
    refinement = ScaleRefinement(CONFIG, context_of(opened))
    parent = Parent(Store(tmp_path).open_or_build("refined", {}, lambda draft: {"blocks": refinement.run(draft)}))
    assert f"Training runs without CUDA graphs ({reason})" in caplog.text  # at once, not only at the end
    (sentence,) = refinement.warnings
    assert f"without CUDA graphs, which this model does not allow ({reason})" in sentence
    assert parent.block(0).keys() == refine(opened, tmp_path / "other", CONFIG)[0].block(0).keys()


def test_refined_bit_widths_get_better_and_the_others_stay(opened: Opened, tmp_path: Path) -> None:
    refined, history = refine(opened, tmp_path, CONFIG)
    before, after = (divergences(opened, parent, WINDOWS[10:]) for parent in (opened.parent, refined))
    assert [row["step"] for row in history] == [0, 8, 16, 24]
    for bits in ("2", "3"):
        best = min(row["kl"][bits] for row in history)
        assert history[0]["kl"][bits] == pytest.approx(before[bits], rel=1e-4)
        assert after[bits] == pytest.approx(best, rel=1e-3)
        assert after[bits] < 0.9 * before[bits]
    for bits in ("4", "6", "8"):
        assert after[bits] == before[bits]
    for index in range(len(refined.blocks)):
        for name, weight in refined.block(index).items():
            original = opened.parent.block(index)[name]
            assert torch.equal(weight.codes, original.codes)
            assert torch.equal(weight.scales, original.scales)
            assert weight.format.scale_bits == (2, 3)


def test_training_that_makes_it_worse_ends_with_the_scales_before(opened: Opened, tmp_path: Path) -> None:
    wild = dataclasses.replace(CONFIG, learning_rate=0.9, warmup_steps=0, steps=8)
    refined, history = refine(opened, tmp_path, wild)
    assert history[-1]["kl"]["2"] > history[0]["kl"]["2"]
    before, after = (divergences(opened, parent, WINDOWS[10:]) for parent in (opened.parent, refined))
    assert after == before


@pytest.mark.parametrize("step_every", [(), (1, 3)])
def test_a_killed_refinement_goes_on_with_the_same_bytes(
    opened: Opened, tmp_path: Path, step_every: tuple[int, ...]
) -> None:
    config = dataclasses.replace(CONFIG, step_every=step_every)
    whole, history = refine(opened, tmp_path / "whole", config)

    class Killed(BaseException):
        pass

    def killing(step: int) -> None:
        taken.append(step)
        if sum(taken) == 19:
            raise Killed

    taken: list[int] = []
    with pytest.raises(Killed):
        refine(opened, tmp_path / "resumed", config, progress=killing)
    steps: list[int] = []
    resumed, resumed_history = refine(opened, tmp_path / "resumed", config, progress=steps.append)
    assert steps[0] == 16
    assert sum(steps) == 24
    assert resumed_history == history
    assert resumed.artifact.sha256 == whole.artifact.sha256
    assert not list(resumed.artifact.path.glob("training*"))


def test_scales_of_one_bit_width_do_not_depend_on_the_others(opened: Opened, tmp_path: Path) -> None:
    both, _ = refine(opened, tmp_path / "both", CONFIG)
    alone, _ = refine(opened, tmp_path / "alone", dataclasses.replace(CONFIG, bits=(3,)))
    for name, weight in alone.block(0).items():
        assert torch.equal(weight.scales_at(3), both.block(0)[name].scales_at(3))


def test_a_bit_width_that_learns_at_every_third_step_takes_a_third_of_the_steps(opened: Opened, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, step_every=(1, 3), steps=22, validate_every=1)
    both, history = refine(opened, tmp_path / "both", config)
    alone, _ = refine(opened, tmp_path / "alone", dataclasses.replace(config, bits=(2,), step_every=()))
    for name, weight in alone.block(0).items():
        assert torch.equal(weight.scales_at(2), both.block(0)[name].scales_at(2))
    changed = [one["step"] for before, one in itertools.pairwise(history) if one["kl"]["3"] != before["kl"]["3"]]
    assert changed == [1, 4, 7, 10, 13, 16, 19, 22]
    assert (config.steps_of(2), config.steps_of(3)) == (22, len(changed))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": ()}, "refine.bits must name at least one bit-width"),
        ({"bits": (2, 2)}, "each once"),
        ({"bits": (9,)}, "refine.bits names 9"),
        ({"steps": 0}, "refine.steps must be at least 1; found 0"),
        ({"step_every": (1, 2, 3)}, r"for each of refine.bits=\[2, 3\], one of them 1; found \[1, 2, 3\]"),
        ({"step_every": (0, 1)}, r"found \[0, 1\]"),
        ({"step_every": (2, 2)}, r"one of them 1; found \[2, 2\]"),
        ({"method": "qat", "step_every": (1, 2)}, "refine.step_every is for refine.method=scales"),
        ({"learning_rate": 1.5}, "refine.learning_rate lies between 0 and 1"),
        ({}, "needs a text: choose the preset refine=scales"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **changes).check(8)
