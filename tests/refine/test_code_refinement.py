"""Refined codes: moves that held bit-widths allow, gradients, training against scales alone, resumption, refusals."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from hydra import compose, initialize_config_dir
from packing import Opened
from refining import CPU, WINDOWS, context_of, refine
from shared import ROOT
from torch import Tensor

from matquant import cli
from matquant.config import from_hydra
from matquant.config_check import check_config
from matquant.errors import UserError
from matquant.evaluate.slices import evaluate_slices
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.parent import Parent
from matquant.formats.slice_spec import SliceSpec
from matquant.models.blocks import BlockModel
from matquant.refine.code_refinement import CodeRefinement, MoveTable, TrainedCodes
from matquant.refine.config import RefineConfig
from matquant.refine.slice_model import open_slice_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RefineConfig(
    method="codes",
    bits=(2, 3, 4),
    held_bits=(6, 8),
    steps=24,
    learning_rate=0.03,
    code_learning_rate=0.1,
    warmup_steps=2,
    validate_every=8,
)


def weights_of(parent: Parent) -> dict[str, NestedWeight]:
    return {name: weight for index in range(len(parent.blocks)) for name, weight in parent.block(index).items()}


def divergences(opened: Opened, parent: Parent, windows: Tensor) -> Mapping[str, float]:
    """KL of each bit-width as the stage evaluate measures it."""
    slices = {str(bits): SliceSpec(name=str(bits), parent=parent, bits=bits) for bits in (2, 3, 4, 6, 8)}
    found = evaluate_slices(opened.blocks, windows, lambda i, name: slices[name].weights(i), list(slices), 2, "cpu")
    return {name: metrics.kl for name, metrics in found.items() if name != "full"}


def values_of(code: int, bits: int, stretch: float, master: int = 8) -> float:
    """Value of a code at a bit-width from its planes, each plus or minus its step."""
    total = 0.0
    for plane in range(bits):
        step = 2.0 ** (master - 2 - plane) * (stretch if plane >= 4 else 1.0)
        total += step if code >> (master - 1 - plane) & 1 else -step
    return total


@pytest.mark.parametrize(
    ("stretch", "prefix_bits", "held"), [(1.25, 4, (6, 8)), (1.5, 4, (8,)), (1.0, 4, (6, 8)), (1.25, 2, (3, 4, 8))]
)
def test_moves_are_those_of_a_search_over_all_codes(stretch: float, prefix_bits: int, held: tuple) -> None:
    table = MoveTable.of(WeightFormat(group_size=32, stretch=stretch), prefix_bits, held)
    later = 8 - prefix_bits
    steps = {bits: 2.0 ** (8 - bits) * (stretch if bits > 4 else 1.0) for bits in held}

    def distance(a: int, b: int, bits: int) -> float:
        return (values_of(a, bits, stretch) - values_of(b, bits, stretch)) / steps[bits]

    for code in range(0, 256, 5):
        for prefix in range(2**prefix_bits):
            choices = {
                other: sum(distance(code, other, bits) ** 2 for bits in held)
                for other in range(prefix << later, prefix + 1 << later)
            }
            found = int(table.codes[code, prefix])
            assert choices[found] == pytest.approx(min(choices.values()), abs=1e-9)
            assert table.errors[code, prefix] == pytest.approx(abs(distance(code, found, 8)), abs=1e-5)
        assert table.codes[code, code >> later] == code


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 4.0, math.inf])
@pytest.mark.parametrize("stretch", [1.0, 1.25, 1.5])
def test_limits_hold_the_value_of_all_bits(stretch: float, tolerance: float) -> None:
    table = MoveTable.of(WeightFormat(group_size=32, stretch=stretch), 4, (8,))
    first, last = (one.tolist() for one in table.limits(tolerance, CPU))
    for code in range(256):
        assert first[code] <= code >> 4 <= last[code]
        inside = [table.errors[code, prefix] <= tolerance for prefix in range(first[code], last[code] + 1)]
        assert all(inside)
        for beyond in (first[code] - 1, last[code] + 1):
            assert beyond in (-1, 16) or table.errors[code, beyond] > tolerance
    assert (first != last) == (tolerance >= 1 or stretch > 1)


@pytest.mark.parametrize(("kind", "head"), [("llama", False), ("gpt2", True), ("mixtral", False)])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_momentum_gets_the_straight_through_gradients_of_a_dense_model(
    kind: str, head: bool, bits: int, tmp_path: Path
) -> None:
    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store", head=head, stretch=1.25)
    weights, ids = weights_of(opened.parent), WINDOWS[:3]
    refinement = CodeRefinement(CONFIG, context_of(opened))
    with open_slice_model(opened.blocks, weights, ids, 3, CPU, torch.float32, refinement.linear) as slices:
        refinement.start(slices)
        first = dict.fromkeys((2, 3, 4, 6, 8), 0.2)  # losses, by which the gradients are divided
        refinement.validated(first)
        refinement.prepare(bits)
        scales = refinement.trained(bits)
        slices.gradients(0, slices.hidden(0), bits, scales)
    model = BlockModel(make_model(kind)).model
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].log_softmax(-1)
    positions = {name: (weight.codes + 0.5).requires_grad_() for name, weight in weights.items()}
    table = MoveTable.of(next(iter(weights.values())).format, 4, (6, 8))
    limits = zip(*(one.tolist() for one in table.limits(0.5, CPU)), strict=True)
    rises = torch.tensor([values_of(16 * b, bits, 1.25) - values_of(16 * a, bits, 1.25) for a, b in limits])
    assert rises.unique().tolist() == [0, 2 ** (8 - bits)]  # no other prefix, or one that this bit-width may tell apart
    dense = {}
    for name, weight in weights.items():
        width = 2 ** (8 - bits)
        centre = (positions[name].detach() / width).floor() * width + width / 2
        steps = (positions[name] + (centre - positions[name]).detach() - weight.format.zero_point).unflatten(
            1, (-1, 32)
        )
        dense[f"{name}.weight"] = (steps * scales[name].detach()[:, :, None]).flatten(1)
    found = torch.func.functional_call(model, dense, (ids,), tie_weights=False).logits[:, :-1].log_softmax(-1)
    (expected.exp() * (expected - found)).sum(-1).mean().backward()
    moved = 0
    for name, codes in refinement._codes.items():
        gradient = positions[name].grad
        if gradient is None:  # an expert without tokens
            assert not codes.momentum.any()
            continue
        moved += int(gradient.any())
        expected_momentum = 0.05 / 0.2 * gradient * rises[weights[name].codes.int()] / 16
        error = (codes.momentum.float() - expected_momentum).abs().max()
        assert error <= 0.005 * expected_momentum.abs().max() + 1e-9  # bfloat16
    assert moved > 4


def test_positions_cross_to_the_next_prefix_and_no_further() -> None:
    fmt = WeightFormat(group_size=32, stretch=1.25)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    weight = NestedWeight(codes=codes, scales=torch.ones(2, 8, dtype=torch.float16), zeros=None, format=fmt)
    table = MoveTable.of(fmt, 4, (6, 8))
    trained, limits = TrainedCodes(weight, table), table.limits(0.5, CPU)
    trained.place(torch.tensor([[-2.4], [300.0]]).expand(2, 256), limits)
    present = trained.present.codes.int()
    assert torch.equal(weight.codes, codes)  # the parent's own
    for code in range(256):
        low = code % 16
        assert present[0, code] >> 4 == (code >> 4) - (low in (0, 1) and code >= 16)  # 2.5 steps needs more than 2.4
        assert present[1, code] >> 4 == (code >> 4) + (low in (13, 14, 15) and code < 240)
    before, after = weight.dequantize(8), trained.present.dequantize(8)
    assert 0 < (before - after).abs().max() <= 0.5 * 1.25
    trained.place(torch.zeros(2, 256), limits)
    assert torch.equal(trained.present.codes, codes)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_step_is_normalized_and_divided_by_the_mean_squares_of_rows_and_columns(power: float) -> None:
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (6, 64), generator=draw).to(torch.uint8)
    fmt = WeightFormat(group_size=32, stretch=1.25)
    weight = NestedWeight(codes=codes, scales=torch.ones(6, 2, dtype=torch.float16), zeros=None, format=fmt)
    trained = TrainedCodes(weight, MoveTable.of(fmt, 4, (6, 8)))
    mean, rows, columns = torch.zeros(6, 64), torch.zeros(6), torch.zeros(64)
    spread, slope = torch.rand(6, 1, generator=draw) + 0.1, torch.rand(256, generator=draw)
    for _ in range(3):
        trained.momentum *= 0.95
        mean *= 0.95
        for share in (0.05, 0.1):  # two bit-widths
            gradient = torch.randn(6, 64, generator=draw) * spread
            trained.accumulate(gradient, torch.full((6, 2), 0.5), share * slope)
            own = gradient * 0.5 * share * slope[codes.int()]
            mean += own
        found = trained.moved(0.2, power)
        rows, columns = 0.99 * rows + mean.square().mean(1), 0.99 * columns + mean.square().mean(0)
    step = mean / ((rows / rows.mean())[:, None] * (columns / columns.mean())) ** power
    expected = -0.2 * step / step.square().mean().sqrt()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.01)
    assert found.square().mean().sqrt() == pytest.approx(0.2, rel=1e-3)


def test_codes_and_scales_get_better_than_scales_alone_and_held_bit_widths_stay(opened: Opened, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, learning_rate=0.01, code_learning_rate=0.05)
    refined, history = refine(opened, tmp_path / "codes", config)
    scales = dataclasses.replace(config, method="scales", held_bits=())
    alone, _ = refine(opened, tmp_path / "scales", scales)
    assert list(history[0]["kl"]) == ["2", "3", "4", "6", "8"]
    before, after, other = (divergences(opened, parent, WINDOWS[10:]) for parent in (opened.parent, refined, alone))
    ratio = sum(math.log(after[bits] / other[bits]) for bits in ("2", "3", "4")) / 3
    assert ratio < -0.02
    for bits in ("6", "8"):
        assert after[bits] <= 1.1 * before[bits]
    moved = 0
    for name, weight in weights_of(refined).items():
        original = weights_of(opened.parent)[name]
        assert torch.equal(weight.scales, original.scales)
        assert weight.format == dataclasses.replace(original.format, scale_bits=(2, 3, 4))
        moved += int((weight.codes != original.codes).sum())
        step = original.scales.float().abs().repeat_interleave(32, 1)[:, : weight.codes.shape[1]] * 1.25
        assert ((weight.dequantize(8) - original.dequantize(8)).abs() <= 0.51 * step).all()
    assert moved > 100


@pytest.mark.parametrize(("code_bits", "first_bits"), [((2,), 2), ((2, 3), 3)])
def test_only_codes_move_whose_slices_of_chosen_bit_widths_change(
    opened: Opened, tmp_path: Path, code_bits: tuple, first_bits: int
) -> None:
    config = dataclasses.replace(CONFIG, code_bits=code_bits, steps=8, code_learning_rate=0.2)
    refined, _ = refine(opened, tmp_path, config)
    moved = 0
    for name, weight in weights_of(refined).items():
        original = weights_of(opened.parent)[name].codes
        changed = weight.codes != original
        assert torch.equal(changed, (weight.codes >> (8 - first_bits)) != (original >> (8 - first_bits)))
        moved += int(changed.sum())
    assert moved > 20


@pytest.mark.parametrize("held_increase", [0.0, 0.05])
def test_wide_moves_are_taken_back_until_held_bit_widths_hold(
    opened: Opened, tmp_path: Path, held_increase: float
) -> None:
    wide = dataclasses.replace(
        CONFIG, code_tolerance=16, bits=(2,), code_learning_rate=0.4, held_increase=held_increase
    )
    refined, _ = refine(opened, tmp_path, wide)
    before, after = (divergences(opened, parent, WINDOWS[10:]) for parent in (opened.parent, refined))
    for bits in ("6", "8"):
        assert after[bits] <= (1 + held_increase) * before[bits] * (1 + 1e-6)
    free, _ = refine(opened, tmp_path / "free", dataclasses.replace(wide, held_increase=1e9))
    assert divergences(opened, free, WINDOWS[10:])["8"] > 2 * before["8"]  # else the test could not fail


def test_training_that_makes_it_worse_ends_with_the_parent_before(opened: Opened, tmp_path: Path) -> None:
    wild = dataclasses.replace(CONFIG, learning_rate=0.9, warmup_steps=0, steps=8)
    refined, history = refine(opened, tmp_path, wild)
    assert history[-1]["kl"]["2"] > history[0]["kl"]["2"]
    before, after = (divergences(opened, parent, WINDOWS[10:]) for parent in (opened.parent, refined))
    assert after == before


@pytest.mark.parametrize("changes", [{}, {"code_tolerance": 16, "code_learning_rate": 4.0}], ids=["held", "narrowed"])
def test_a_killed_refinement_goes_on_with_the_same_bytes(opened: Opened, tmp_path: Path, changes: dict) -> None:
    config = dataclasses.replace(CONFIG, **changes)
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
    assert resumed_history == history
    assert resumed.artifact.sha256 == whole.artifact.sha256
    assert not list(resumed.artifact.path.glob("training*"))


@pytest.mark.slow
def test_codes_of_experts_without_tokens_stay(tmp_path: Path) -> None:
    opened = Opened(save(make_model("mixtral"), tmp_path / "model"), tmp_path / "store", stretch=1.25)
    same = torch.full((14, 2), 7)  # one token, so that few experts are read
    refined, _ = refine(opened, tmp_path / "refined", CONFIG, windows=same[:10], validation=same[10:])
    still = [
        torch.equal(weight.codes, weights_of(opened.parent)[name].codes) for name, weight in weights_of(refined).items()
    ]
    assert any(still)
    assert not all(still)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"held_bits": ()}, "refine.held_bits must name at least one bit-width"),
        ({"held_bits": (4, 8)}, r"above those of refine.bits=\[2, 3, 4\] and at most 8; found \[4, 8\]"),
        ({"held_bits": (8, 8)}, "each once"),
        ({"held_bits": (9,)}, "at most 8"),
        ({"held_increase": -0.1}, "refine.held_increase cannot be negative"),
        ({"held_increase": math.nan}, "refine.held_increase cannot be negative"),
        ({"code_tolerance": 0.4}, "refine.code_tolerance is at least 0.5"),
        ({"code_bits": (2, 5)}, r"refine.code_bits must be among refine.bits=\[2, 3, 4\]; found \[2, 5\]"),
        ({"code_curvature_power": 1.1}, "refine.code_curvature_power lies in 0..1; found 1.1"),
        ({"code_curvature_power": math.nan}, "refine.code_curvature_power lies in 0..1"),
        ({"code_learning_rate": 0.0}, "refine.code_learning_rate is above 0"),
        ({"code_learning_rate": math.inf}, "refine.code_learning_rate is above 0"),
        ({"method": "scales"}, "refine.held_bits is for refine.method=codes"),
        ({"bits": (2, 9)}, "refine.bits names 9"),
        ({}, "choose the preset refine=codes"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **changes).check(8)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=matgptq_v1"], "slices of method.slicing=round depend on the bit after theirs"),
        (["method.stretch=1"], "refine.code_tolerance=0.5 lets no code move"),
        (["method.stretch=1", "refine.code_tolerance=0.9"], "refine.code_tolerance=0.9 lets no code move"),
        (["method=gptq"], "refine=codes trains one parent, but method=gptq makes one model per bit-width"),
        (["method.stretch=1", "refine.code_tolerance=1"], None),
    ],
    ids=str,
)
def test_parents_whose_codes_cannot_be_trained_are_refused(overrides: list[str], sentence: str | None) -> None:
    cli.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", ["refine=codes", *overrides]))
    if sentence is None:
        check_config(config)
        return
    with pytest.raises(UserError, match=sentence):
        check_config(config)
