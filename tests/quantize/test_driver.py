"""The block by block driver on a tiny random Llama, against direct computations on the whole model."""

import fnmatch
import gc

import pytest
import torch
from quantizers import gptq, rtn
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.calibration import hessian
from matquant.calibration.activation_streams import FULL, ActivationStreams
from matquant.calibration.hessian import HessianAccumulator
from matquant.errors import UserError
from matquant.formats.parent import read_block
from matquant.models import tracing
from matquant.models.blocks import BlockModel
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layer_selection import check_layers, layers_to_quantize
from matquant.store import Store
from matquant.timing import PhaseTimer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAMBDAS = {2: 1.0, 4: 4.0, 8: 64.0}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows():
    return torch.randint(2048, (5, 16), generator=torch.Generator().manual_seed(1))


def driver_of(model, quantizer, skip=(), lm_head=False):
    blocks = BlockModel(model)
    return BlockwiseQuantizer(
        blocks, layers_of(blocks, skip, lm_head), quantizer, device=CPU, dtype=torch.float32, batch_size=2
    )


def layers_of(blocks, skip=(), lm_head=False):
    return layers_to_quantize(
        blocks, lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in skip), lm_head=lm_head
    )


def run(driver, windows, folder):
    """The records of all blocks, and all quantized layers by name."""
    records, weights = [], {}

    def build(draft):
        records.extend(driver.run(draft, windows))
        for record in records:
            weights.update(read_block(draft, record["file"])[0])
        return {"label": "parent"}

    Store(folder).open_or_build("parent", {}, build)
    return records, weights


def test_a_block_leaves_nothing_behind_that_only_the_garbage_collector_would_find(model, windows, tmp_path):
    """It seldom looks, and does not know how much of a GPU's memory a tensor keeps."""
    driver = driver_of(model, gptq(LAMBDAS))
    alive = []

    def count(_: dict) -> None:
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    driver.finished = count
    gc.collect()
    gc.disable()
    try:
        run(driver, windows, tmp_path)
    finally:
        gc.enable()
    assert alive[1] == alive[0]


@torch.no_grad()
def inputs_of(model, windows, names):
    """Inputs of the named layers in one forward pass of the whole model: [tokens, in_features] of each."""
    caught = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught.update({name: args[0].flatten(0, 1)})
        )
        for name in names
    ]
    model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return caught


def test_the_moments_of_block_0_are_those_of_the_whole_model(model, windows):
    blocks = BlockModel(model)
    layers = blocks.linears(0)
    streams = ActivationStreams(blocks, windows, [FULL, "2", "8"], 2, CPU, torch.float32)
    moments = {s: [HessianAccumulator(m.in_features, asymmetric=True) for m in layers.values()] for s in ("2", "8")}
    with blocks.on_device(0, CPU, torch.float32):
        for batch in streams.layer_inputs(0, list(layers.values()), {}):
            for stream, of_layers in moments.items():
                for moment, found, full in zip(of_layers, batch[stream], batch[FULL], strict=True):
                    moment.update(found, full)
    direct = inputs_of(model, windows, layers)
    for stream in moments.values():
        for moment, name in zip(stream, layers, strict=True):
            assert moment.tokens == windows.numel()
            expected = 2 * direct[name].T @ direct[name] / windows.numel()
            torch.testing.assert_close(moment.hessian, expected, rtol=1e-4, atol=1e-6)
            assert moment.cross.count_nonzero() == 0
            assert torch.equal(moment.hessian, moments["2"][list(layers).index(name)].hessian)


def test_the_moments_of_block_1_follow_each_streams_own_weights(model, windows):
    """Stream ``2`` of block 1 sees what a whole model sees whose block 0 has those weights; ``full`` is the model itself."""
    blocks = BlockModel(model)
    name = "model.layers.1.self_attn.q_proj"
    changed = {n: m.weight.detach().round(decimals=2) for n, m in blocks.linears(0).items()}
    streams = ActivationStreams(blocks, windows, [FULL, "2"], 2, CPU, torch.float32)
    with blocks.on_device(0, CPU, torch.float32):
        streams.advance(0, lambda name: changed if name == "2" else {})
    moments = HessianAccumulator(64, asymmetric=True)
    with blocks.on_device(1, CPU, torch.float32):
        for batch in streams.layer_inputs(1, [model.get_submodule(name)], {}):
            moments.update(batch["2"][0], batch[FULL][0])
    full = inputs_of(model, windows, [name])[name]
    with blocks.with_weights(0, changed):
        quantized = inputs_of(model, windows, [name])[name]
    count = windows.numel()
    torch.testing.assert_close(moments.hessian, 2 * quantized.T @ quantized / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.cross, 2 * (full - quantized).T @ quantized / count, rtol=1e-3, atol=1e-5)
    assert moments.cross.abs().max() > 1e-3


def test_moments_of_other_tokens_give_up_the_cross():
    moments = HessianAccumulator(4, asymmetric=True)
    moments.update(torch.ones(3, 4), torch.ones(3, 4))
    moments.update(torch.ones(2, 4), torch.ones(1, 4))
    moments.update(torch.ones(3, 4), torch.ones(3, 4))
    assert moments.cross is None
    assert moments.tokens == 8
    assert torch.equal(moments.hessian, torch.full((4, 4), 2.0))


@pytest.mark.parametrize("columns", [3, 4, 10])
def test_half_of_the_squares_is_computed_and_all_of_them_known(columns, monkeypatch):
    monkeypatch.setattr(hessian, "PANEL_COLUMNS", 4)
    inputs, other = torch.randn(2, 20, columns, generator=torch.Generator().manual_seed(0))
    moments, more = HessianAccumulator(columns), HessianAccumulator(columns)
    moments.update(inputs)
    more.update(other)
    moments.merge(more)
    torch.testing.assert_close(moments.hessian, (inputs.T @ inputs + other.T @ other) / 20)


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ((2, 3, 4, 8), {2: 2, 3: 3, 4: 4, 5: 4, 6: 8, 7: 8, 8: 8}),
        ((8, 2), {2: 2, 3: 2, 4: 2, 5: 8, 6: 8}),
        ((4,), {2: 4, 8: 4}),
    ],
)
def test_each_width_takes_the_nearest_stream_and_the_higher_of_two(streams, expected):
    assert {bits: gptq(LAMBDAS, streams).calibration_bits_of(bits) for bits in expected} == expected


@pytest.mark.parametrize(
    "quantizer", [gptq(LAMBDAS, (8,), asymmetric=False, true_sequential=False), gptq(LAMBDAS)], ids=["one", "two"]
)
def test_every_layer_is_quantized_near_its_weight(model, windows, tmp_path, quantizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records, weights = run(driver_of(model, quantizer), windows, tmp_path)
    assert [record["notes"] for record in records] == [[], []]
    assert sum(len(record["layers"]) for record in records) == len(weights) == 2 * len(LAYERS)
    for record in records:
        for name, layer in record["layers"].items():
            assert layer["shape"] == list(before[f"{name}.weight"].shape)
            assert set(layer["errors"]) == {"2", "4", "8"}
            assert layer["errors"]["8"] < 0.01 < layer["errors"]["2"] < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_skipped_layers_are_left_out(model, windows, tmp_path):
    driver = driver_of(model, gptq(LAMBDAS), skip=["*.down_proj", "model.layers.1.self_attn.*"])
    records, weights = run(driver, windows, tmp_path)
    left = {f"model.layers.0.self_attn.{n}" for n in LAYERS[:4]}
    left |= {f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in LAYERS[4:6]}
    assert set(weights) == left
    assert {name for record in records for name in record["layers"]} == left
    assert not any(record["notes"] for record in records)


def test_a_layer_that_saw_no_data_is_rounded_and_noted(model, windows, tmp_path, monkeypatch):
    """A probe that never reaches the gates and ups stands for experts that no token chooses."""
    groups = tracing.shared_input_groups

    def without_gates(blocks, index):
        found = groups(blocks, index)
        found.groups[:] = [group for group in found.groups if "gate_proj" not in group[0]]
        return found

    plain, dropped = driver_of(model, gptq(LAMBDAS)), ["gate_proj", "up_proj"]
    monkeypatch.setattr("matquant.quantize.gptq.quantizer.shared_input_groups", without_gates)
    records, weights = run(plain, windows, tmp_path / "calibrated")
    _, nearest = run(driver_of(model, rtn(LAMBDAS, stretch=1.25)), None, tmp_path / "nearest")
    for index, record in enumerate(records):
        names = [f"model.layers.{index}.mlp.{n}" for n in dropped]
        assert record["notes"] == [f"{name} saw no calibration data; it was rounded to nearest." for name in names]
        for name in names:
            assert record["layers"][name]["errors"] == {}
            assert torch.equal(weights[name].codes, nearest[name].codes)
        down = f"model.layers.{index}.mlp.down_proj"
        assert not torch.equal(weights[down].codes, nearest[down].codes)


def test_a_resumed_run_makes_the_same_codes(model, windows, tmp_path):
    class Interrupted(Exception):
        pass

    _, expected = run(driver_of(model, gptq(LAMBDAS)), windows, tmp_path / "whole")
    store, solved, weights = Store(tmp_path / "parts"), [], {}

    def build(draft, stop_after=None):
        driver = driver_of(model, gptq(LAMBDAS))

        def progress(count):
            solved.append(count)
            if len(solved) == stop_after:
                raise Interrupted

        driver.progress = progress
        for record in driver.run(draft, windows):
            weights.update(read_block(draft, record["file"])[0])
        return {"label": "parent"}

    with pytest.raises(Interrupted):
        store.open_or_build("parent", {}, lambda draft: build(draft, stop_after=9))  # in the second block
    solved.clear()
    store.open_or_build("parent", {}, build)
    assert solved == [7] + [1] * 7
    for name, weight in expected.items():
        assert torch.equal(weights[name].codes, weight.codes)
        assert torch.equal(weights[name].scales, weight.scales)


def test_nothing_to_do_is_refused(model):
    blocks = BlockModel(model)
    check_layers(layers_of(blocks))
    check_layers(layers_of(blocks, ["*.[qkvo]_proj", "*.gate_proj", "*.up_proj"]))
    with pytest.raises(UserError, match="leaves no layer"):
        check_layers(layers_of(blocks, ["*"]))


def test_the_head_is_a_block_after_the_last_when_asked_for(model, windows, tmp_path):
    records, weights = run(driver_of(model, gptq(LAMBDAS), lm_head=True), windows, tmp_path)
    assert [len(record["layers"]) for record in records] == [7, 7, 1]
    (name,) = records[-1]["layers"]
    assert weights[name].codes.shape == (2048, 64)
    assert records[-1]["layers"][name]["errors"]["8"] < 0.01


def test_what_is_measured_within_a_phase_does_not_count_for_it(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = PhaseTimer(CPU)
    with phases.timed("forward"):
        for _ in range(2):
            with phases.nested("moments"):
                pass
    with phases.timed("forward"):
        pass
    assert phases.seconds == {"forward": 8.5, "moments": 2.5}
