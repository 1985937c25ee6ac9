"""Memory and operations of the GPTQ block quantizer, from the sizes of the largest block."""

import dataclasses
from collections.abc import Sequence

from matquant.calibration.hessian import PANEL_COLUMNS
from matquant.memory import FLOAT32_BYTES
from matquant.models.model_sizes import LayerSize, ModelSizes
from matquant.quantize.base import CalibrationTokens, MethodMemory
from matquant.quantize.gptq.solver import MAX_WEIGHTS_AT_ONCE

# Bytes of Hessian accumulators that are held at once. Further experts are calibrated in parts, at the cost of a pass each.
MAX_HESSIAN_BYTES = 2**33

_FACTORIZATION_MATRICES = (
    4  # square matrices alive in a factorization: damped Hessian, its factor, inverse, inverse's factor
)
_CODE_ARRAYS = 4  # arrays of a matrix's size while its codes are dequantized: indices, values, intermediate results


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GptqSettings:
    """Settings that memory depends on: numbers of activation streams and of the objective's bit-widths, and techniques."""

    streams: int
    bit_widths: int
    asymmetric: bool
    true_sequential: bool


def gptq_memory(settings: GptqSettings, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
    """Peak bytes of calibrating and of solving the largest block."""
    stages = _stages(settings, sizes)
    return MethodMemory(
        calibrate=max((_calibrate(settings, sizes, tokens, stage) for stage in stages), default=0),
        solve=max((_solve(settings, stage) for stage in stages), default=0),
    )


def uncalibrated_memory(sizes: ModelSizes, bit_widths: int) -> int:
    """Peak bytes of solving a layer without Hessians: weights, targets of each bit-width, arrays of the dequantization."""
    n = max(layer.columns for layer in sizes.layers)
    weights = max(layer.rows * layer.columns for layer in sizes.layers if layer.columns == n)
    return (weights + (bit_widths + _CODE_ARRAYS) * min(weights, MAX_WEIGHTS_AT_ONCE)) * FLOAT32_BYTES


def gptq_operations(settings: GptqSettings, sizes: ModelSizes, tokens: CalibrationTokens) -> float:
    """Floating-point operations of all blocks, the solver's by a rule of thumb."""
    stages = _stages(settings, sizes)
    passes = 2.0 * sizes.block * sizes.blocks
    # A stage runs the block about half way on average, and one pass makes the next block's inputs.
    total = passes * tokens.total * (settings.streams + settings.asymmetric) * (1 + len(stages) / 2)
    for n in (n for stage in stages for n in _input_sizes(stage)):
        hessians = 2.0 * tokens.total * n * n * settings.streams * (1 + settings.asymmetric)
        total += sizes.blocks * (hessians + 4.0 * n**3 * settings.streams)
    # Error feedback and two coordinate-descent passes are a few products with a Hessian; choosing a code costs about 2000
    # operations per weight.
    for layer in sizes.layers:
        total += sizes.blocks * settings.bit_widths * layer.rows * layer.columns * (8.0 * layer.columns + 2000)
    return total


def hessian_bytes(streams: int, asymmetric: bool, columns: int) -> int:
    """Bytes of the float64 accumulators of one input: squares of each stream, and cross terms if asymmetric."""
    return 8 * columns**2 * streams * (1 + asymmetric)


def _stages(settings: GptqSettings, sizes: ModelSizes) -> list[list[LayerSize]]:
    """Layers whose Hessians are accumulated in one pass."""
    if not settings.true_sequential:
        return [list(sizes.layers)]
    stages = dict.fromkeys(layer.stage for layer in sizes.layers)
    return [[layer for layer in sizes.layers if layer.stage == number] for number in stages]


def _input_sizes(stage: Sequence[LayerSize]) -> list[int]:
    """Columns of each distinct input of a stage."""
    return list({layer.input: layer.columns for layer in stage}.values())


def _all_hessians(settings: GptqSettings, inputs: Sequence[int]) -> int:
    """Bytes of the accumulators that are alive together."""
    each = [hessian_bytes(settings.streams, settings.asymmetric, columns) for columns in inputs]
    return min(sum(each), max(MAX_HESSIAN_BYTES, *each)) if each else 0


def _calibrate(settings: GptqSettings, sizes: ModelSizes, tokens: CalibrationTokens, stage: Sequence[LayerSize]) -> int:
    """Bytes for the Hessians of a stage.

    Accumulators of the stage, captured inputs of a batch, dequantized layers of earlier stages, and the larger one of the
    batch's activations and a product that is added to the accumulators.
    """
    streams, asymmetric = settings.streams, settings.asymmetric
    earlier = sum(layer.rows * layer.columns for layer in sizes.layers if layer.stage < min(one.stage for one in stage))
    dequantized = streams * earlier * sizes.computing if settings.true_sequential else 0
    inputs = _input_sizes(stage)
    widest = max(inputs)
    product = widest * (widest if asymmetric else min(widest, PANEL_COLUMNS)) * FLOAT32_BYTES
    captured = (streams + asymmetric) * tokens.batch * sum(inputs) * sizes.computing
    difference = asymmetric * tokens.batch * widest * FLOAT32_BYTES
    forward = max(sizes.activation_bytes(tokens.batch), difference + product)
    return _all_hessians(settings, inputs) + dequantized + captured + forward


def _solve(settings: GptqSettings, stage: Sequence[LayerSize]) -> int:
    """Arrays alive while the layers of a stage are solved; those with the widest input need most."""
    inputs = _input_sizes(stage)
    n, streams, asymmetric = max(inputs), settings.streams, settings.asymmetric
    weights = max(layer.rows * layer.columns for layer in stage if layer.columns == n)
    part = min(weights, MAX_WEIGHTS_AT_ONCE)
    # Compensated targets and gradients of each bit-width, and the uncompensated targets if they are corrected.
    arrays = settings.bit_widths * (2 + asymmetric) + _CODE_ARRAYS
    solver = (weights + arrays * part) * FLOAT32_BYTES
    others = list(inputs)
    others.remove(n)
    square = n * n * FLOAT32_BYTES
    given = streams * (1 + asymmetric) * square
    prepared = streams * (2 + asymmetric) * square  # damped Hessian, factor, target correction
    # The last stream's matrices are being made while its Hessian is factorized.
    factorizing = prepared + (_FACTORIZATION_MATRICES - 2 - asymmetric) * square
    return _all_hessians(settings, others) + given + max(factorizing, prepared + solver)
