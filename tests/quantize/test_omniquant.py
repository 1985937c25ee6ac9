"""MatQuant on OmniQuant: its loss against a direct computation, training, activation streams, resumption, refusals."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model
from torch import Tensor

from matquant.calibration.activation_streams import ActivationStreams
from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import read_block
from matquant.models.blocks import BlockModel
from matquant.quantize.base import BlockContext, QuantizerTask
from matquant.quantize.config import LayerOverride, check_method
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layer_selection import layers_to_quantize
from matquant.quantize.omniquant.config import OmniQuantConfig
from matquant.quantize.omniquant.quantizer import BlockTraining, OmniQuantizer
from matquant.store import Store
from matquant.timing import PhaseTimer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
LAMBDAS = {2: 1.0, 4: 0.1, 8: 0.1}
WINDOWS = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(0))


def quantizer_of(lambdas: Mapping[int, float] = LAMBDAS, master_bits: int = 8, **settings: Any) -> OmniQuantizer:
    config = OmniQuantConfig(**{"group_size": 32, "epochs": 2} | settings)
    return config.build(QuantizerTask.of(lambdas, master_bits, torch.float32))


@contextmanager
def first_block(kind: str, quantizer: OmniQuantizer, **changes: Any) -> Iterator[BlockContext]:
    blocks = BlockModel(make_model(kind))
    with blocks.on_device(0, CPU, torch.float32):
        yield BlockContext(
            index=0,
            model=blocks,
            layers=blocks.linears(0),
            streams=ActivationStreams(blocks, WINDOWS, quantizer.calibration.streams, 2, CPU, torch.float32),
            device=CPU,
            dtype=torch.float32,
            solver_device=CPU,
            timer=PhaseTimer(CPU),
            **changes,
        )


def quantize(
    quantizer: OmniQuantizer, store: Path, kind: str = "llama", head: bool = False, progress: Any = None
) -> Any:
    """Artifact of a parent and all its weights by layer."""
    blocks = BlockModel(make_model(kind))
    layers = layers_to_quantize(blocks, lambda _: False, lm_head=head)
    driver = BlockwiseQuantizer(blocks, layers, quantizer, device=CPU, dtype=torch.float32, batch_size=2)
    driver.progress = progress or (lambda _: None)
    artifact = Store(store).open_or_build("parent", {}, lambda draft: {"blocks": driver.run(draft, WINDOWS)})
    weights: dict[str, NestedWeight] = {}
    for record in artifact.about["blocks"]:
        weights |= read_block(artifact, record["file"])[0]
    return artifact, weights


def block_output(kind: str, weights: Mapping[str, Tensor], windows: Tensor) -> Tensor:
    """Output of the first block of the model with some weights replaced, from one forward pass of the whole model."""
    model = make_model(kind)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model(windows, output_hidden_states=True).hidden_states[1]


@pytest.mark.parametrize(
    ("distillation", "terms"),
    [
        ({}, {"full": (8, 4, 2), "wide": ()}),
        ({"distilled_bits": (2,)}, {"full": (8, 4, 2), "wide": (2,)}),
        ({"distilled_bits": (2,), "distill_only": True}, {"full": (8, 4), "wide": (2,)}),
        ({"distilled_bits": (4, 2)}, {"full": (8, 4, 2), "wide": (4, 2)}),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_loss_is_the_weighted_sum_of_squared_errors_of_the_published_terms(distillation: dict, terms: dict) -> None:
    quantizer = quantizer_of(**distillation)
    with torch.enable_grad(), first_block("llama", quantizer) as context:
        training = BlockTraining(quantizer, context)
        found, gradients = training.loss_and_gradients(1)
    full = block_output("llama", {}, WINDOWS[2:])
    slices = {
        bits: block_output("llama", {n: one.slice(bits) for n, one in training.layers.items()}, WINDOWS[2:])
        for bits in (8, 4, 2)
    }
    targets = {"full": full, "wide": slices[8]}
    expected = sum(
        LAMBDAS[bits] * (slices[bits] - targets[name]).square().mean() for name, used in terms.items() for bits in used
    )
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_step_against_the_gradient_lowers_the_loss_and_one_along_it_raises_it(bits: int) -> None:
    quantizer = quantizer_of({bits: 1.0})
    losses = []
    for step in (-0.3, 0.0, 0.3):
        with first_block("llama", quantizer) as context:
            training = BlockTraining(quantizer, context)
            _, gradients = training.loss_and_gradients(0)
            logits = [tensor for one in training.layers.values() for tensor in (one.upper, one.lower)]
            norm = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()
            with torch.no_grad():
                for tensor, gradient in zip(logits, gradients, strict=True):
                    tensor += step / norm * gradient
            losses.append(training.loss_and_gradients(0)[0])
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("inputs", ["full_precision", "quantized"])
def test_training_lowers_the_loss_and_the_parent_holds_its_slices(kind: str, inputs: str) -> None:
    quantizer = quantizer_of(epochs=15, learning_rate=0.1, inputs=inputs)
    with first_block(kind, quantizer) as context:
        start, _ = BlockTraining(quantizer, context).loss_and_gradients(0)
        training = BlockTraining(quantizer, context)
        result = training.run()
        end, _ = training.loss_and_gradients(0)
    assert end < 0.9 * start
    for name, weight in result.weights.items():
        assert weight.format == quantizer.weight_format(name, weight.codes.shape[1])
        for bits in (2, 3, 8):
            assert torch.equal(weight.dequantize(bits), training.layers[name].slice(bits).detach())


def test_quantized_inputs_are_the_outputs_of_the_own_slices_before() -> None:
    assert quantizer_of().calibration.streams == ["full"]
    assert quantizer_of(inputs="quantized").calibration.streams == ["full", "2", "4", "8"]
    alone = quantizer_of({2: 1.0}, inputs="quantized", distilled_bits=(2,))
    assert alone.calibration.streams == ["full", "2", "8"]


@pytest.mark.parametrize("moved", ["2", "8", "full"])
@torch.no_grad()
def test_each_bit_width_reads_its_own_stream_and_aims_at_the_full_precision_model(moved: str) -> None:
    quantizer = quantizer_of({2: 1.0, 8: 0.5}, inputs="quantized")
    with torch.enable_grad(), first_block("llama", quantizer) as context:
        assert context.streams is not None
        hidden = context.streams.hidden[moved][slice(0, 2)].clone()
        context.streams.hidden[moved][slice(0, 2)] = hidden + 0.1 * torch.randn(hidden.shape)
        training = BlockTraining(quantizer, context)
        found, _ = training.loss_and_gradients(0)
        target = context.forward(context.inputs("full", 0), 0)
        expected = 0.0
        for bits, weight in ((2, 1.0), (8, 0.5)):
            weights = {name: one.slice(bits) for name, one in training.layers.items()}
            output = context.forward(context.inputs(str(bits), 0), 0, weights)
            expected += weight * (output - target).square().mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", [False, True])
def test_a_parent_is_made_with_the_same_bytes_after_a_kill(head: bool, tmp_path: Path) -> None:
    quantizer = quantizer_of(inputs="quantized")
    whole, weights = quantize(quantizer, tmp_path / "whole", head=head)
    assert len(weights) == 2 * 7 + head

    class Killed(BaseException):
        pass

    def killing(_: int) -> None:
        done.append(1)
        if len(done) == 10:  # in the second block
            raise Killed

    done: list[int] = []
    with pytest.raises(Killed):
        quantize(quantizer, tmp_path / "resumed", head=head, progress=killing)
    resumed, _ = quantize(quantizer_of(inputs="quantized"), tmp_path / "resumed", head=head)
    assert resumed.sha256 == whole.sha256


def test_a_model_of_one_bit_width_is_plain_omniquant(tmp_path: Path) -> None:
    _, weights = quantize(quantizer_of({3: 1.0}, 3, per_bit_models=True), tmp_path)
    for weight in weights.values():
        assert weight.format.master_bits == 3
        assert 4 < weight.codes.max() <= 7


def test_every_setting_is_part_of_the_key() -> None:
    changes: list[dict[str, Any]] = [{"epochs": 3}, {"learning_rate": 0.1}, {"inputs": "quantized"}, {"group_size": 64}]
    changes += [{"distilled_bits": (2,)}, {"distilled_bits": (2,), "distill_only": True}, {"lambdas": {2: 1.0}}]
    keys = [str(quantizer_of(**change).cache_key()) for change in ({}, *changes)]
    assert len(set(keys)) == len(keys)
    assert quantizer_of().depends_on_batch_size


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slicing": "msb"}, "trains round slices"),
        ({"symmetric": True}, "a zero point for each group"),
        ({"epochs": 0}, "method.epochs must be at least 1"),
        ({"learning_rate": 2.0}, "method.learning_rate lies between 0 and 1"),
        ({"distilled_bits": (8,)}, "only those below 8"),
        ({"distilled_bits": (2, 2)}, "names each bit-width once"),
        ({"distilled_bits": (1,)}, "must lie in 2..8"),
        ({"distill_only": True}, "needs method.distilled_bits"),
        ({"distilled_bits": (2,), "per_bit_models": True}, "no wider slice to aim at"),
        ({"overrides": {"*": LayerOverride(weights={2: 1.0})}}, "cannot have weights of its own"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_method(dataclasses.replace(OmniQuantConfig(), **changes))


def test_work_that_cannot_be_done_is_refused() -> None:
    with pytest.raises(UserError, match="names 3, which has no weight in the objective"):
        quantizer_of(distilled_bits=(3,))
    quantizer = quantizer_of()
    two = first_block("llama", quantizer, process_group=ProcessGroup(0, 2))
    with two as context, pytest.raises(UserError, match="Start the job without torchrun"):
        quantizer.quantize_block(context)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [slice(0, 2), slice(2, 4)], ids=["first", "second"])
def test_a_loss_that_is_not_finite_is_refused(value: float, batch: slice) -> None:
    quantizer = quantizer_of()
    with first_block("llama", quantizer) as context:
        assert context.streams is not None
        hidden = context.streams.hidden["full"][batch].clone()
        hidden[0, 0, 0] = value
        context.streams.hidden["full"][batch] = hidden
        with pytest.raises(UserError, match="The loss of block 0 is not finite"):
            quantizer.quantize_block(context)
