"""Seam of the quantization methods: a block quantizer maps one decoder block to nested weights.

A method is a subclass of ``BlockQuantizer`` and a subclass of ``MethodConfig`` whose ``build`` constructs it. The driver
(``matquant.quantize.driver``) loads blocks, propagates activations, commits and resumes; it handles no Hessians or scales.
A method has no access to the checkpoint or the store. Nothing around ``quantize_block`` disables gradients.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from matquant.calibration.activation_streams import FULL, ActivationStreams
from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.packed import LayerSpec
from matquant.models.blocks import BlockModel
from matquant.models.model_sizes import ModelSizes
from matquant.timing import PhaseTimer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerTask:
    """Parent that a quantizer is built for.

    Attributes:
        lambdas: weight of each bit-width in the objective; the largest is 1.
        master_bits: bits of a code.
        dtype: of the model's weights.
        layers: full names of all layers that are quantized.
    """

    lambdas: Mapping[int, float]
    master_bits: int
    dtype: torch.dtype
    layers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, lambdas: Mapping[int, float], master_bits: int, dtype: torch.dtype, layers: tuple[str, ...] = ()
    ) -> "QuantizerTask":
        """Task with the lambdas scaled to a largest value of 1, since only their ratios matter; zero weights are dropped."""
        return cls(lambdas=normalized(lambdas), master_bits=master_bits, dtype=dtype, layers=layers)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype in which scales are stored: float16 for a float32 model, else the model's dtype."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype


def normalized(lambdas: Mapping[int, float]) -> dict[int, float]:
    """Positive weights by ascending bit-width, scaled to a largest value of 1."""
    largest = max(lambdas.values())
    return {bits: weight / largest for bits, weight in sorted(lambdas.items()) if weight > 0}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationNeeds:
    """Activations that a method needs propagated through the model.

    Attributes:
        bits: bit-widths whose slices are propagated, a stream of hidden states each.
        full_precision: propagate the full-precision model too.
    """

    bits: tuple[int, ...]
    full_precision: bool

    @property
    def streams(self) -> list[str]:
        """Names of the activation streams, full precision first."""
        return [FULL] * self.full_precision + [str(bits) for bits in self.bits]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTokens:
    """Size of the calibration text on one process, for memory estimates: tokens in all, and in one batch."""

    total: int
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MethodMemory:
    """Peak bytes of a method on the largest block, beside the block itself and the propagated hidden states.

    Attributes:
        calibrate: on the device where blocks run.
        solve: on the device of the numerical work.
    """

    calibrate: int
    solve: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """Decoder block to quantize, with its inputs. The head is a block after the last one.

    Attributes:
        index: of the block.
        model: all blocks; block ``index`` is on ``device`` in ``dtype``.
        layers: linear layers to quantize by full name; weights are [out_features, in_features].
        streams: hidden states in front of the block, one stream per name of ``CalibrationNeeds.streams``; None for a method
            without calibration, whose blocks are not run.
        device, dtype: of the block.
        solver_device: of the numerical work.
        process_group: processes that share the calibration sequences; each calls the method with the same arguments.
        timer: seconds by phase.
        progress: called with 1 after each quantized layer.
    """

    index: int
    model: BlockModel
    layers: Mapping[str, nn.Linear]
    streams: ActivationStreams | None
    device: torch.device
    dtype: torch.dtype
    solver_device: torch.device
    process_group: ProcessGroup = SINGLE_PROCESS
    timer: PhaseTimer
    progress: Callable[[int], None] = lambda _: None

    @property
    def is_head(self) -> bool:
        """True for the head, which has no block module of its own."""
        return self.index == len(self.model)

    @property
    def module(self) -> nn.Module:
        """Module of the block; the whole model for the head."""
        return self.model.model if self.is_head else self.model.blocks[self.index]

    @property
    def expert_groups(self) -> dict[str, str]:
        """Group name of each layer that belongs to one of several experts, see ``BlockModel.expert_groups``."""
        return {} if self.is_head else self.model.expert_groups(self.index)

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        return 0 if self.streams is None else self.streams.batches

    def inputs(self, stream: str, batch: int) -> Tensor:
        """Hidden states in front of the block: [batch, length, hidden] of one stream."""
        assert self.streams is not None
        return self.streams.block_inputs(stream, batch)

    def forward(self, hidden: Tensor, batch: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output of the block for hidden states of a batch, with some layers' weights replaced; keeps the autograd graph.

        Args:
            hidden: [batch, length, hidden].
            batch: number of the batch, whose masks and position embeddings are used.
            weights: [out_features, in_features] by full layer name; the other layers keep their own.

        Returns:
            [batch, length, hidden]; for the head the logits.
        """
        assert self.streams is not None
        with self.model.with_weights(self.index, weights or {}):
            return self.streams.run(self.index, batch, hidden)

    @torch.no_grad()
    def full_precision_outputs(self, batch: int, stream: str = FULL) -> Tensor:
        """Output of the full-precision block for the inputs of a stream; of the full-precision model by default."""
        return self.forward(self.inputs(stream, batch), batch)


def dequantize_stream(stream: str, weights: Mapping[str, NestedWeight], context: BlockContext) -> dict[str, Tensor]:
    """Dense weights of one activation stream on the block's device; none for the full-precision stream."""
    if stream == FULL:
        return {}
    return {name: w.to(context.device).dequantize(int(stream), context.dtype) for name, w in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """Quantized block.

    Attributes:
        weights: nested weights on the CPU by full layer name, in the order in which they are stored.
        errors: relative output error of each layer by bit-width; empty where it was not measured.
        notes: sentences that the user should read.
        experts: layers of experts that saw too few tokens: ``name``, ``tokens``, ``inputs``.
    """

    weights: dict[str, NestedWeight] = dataclasses.field(default_factory=dict)
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    experts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """JSON-able record that the parent keeps beside the tensors."""
        layers = {
            name: {"shape": list(weight.codes.shape), "errors": self.errors.get(name, {})}
            for name, weight in self.weights.items()
        }
        record: dict[str, Any] = {"layers": layers, "notes": self.notes}
        return record | ({"experts": self.experts} if self.experts else {})


class BlockQuantizer(abc.ABC):
    """Terminal quantizer of decoder blocks; one object quantizes one parent.

    Attributes:
        calibration: activations to propagate; None for a method that needs no calibration text.
        depends_on_batch_size: True if calibration batches of another size give other codes.
        version: part of a parent's key; raise it when the same settings give other codes than before.
    """

    version: ClassVar[int] = 1
    depends_on_batch_size: ClassVar[bool] = False
    calibration: CalibrationNeeds | None = None

    @abc.abstractmethod
    def quantize_block(self, context: BlockContext) -> BlockResult:
        """Quantize the layers of one block.

        Raises:
            UserError: the block cannot be quantized; names the layer and a way out.
        """

    @abc.abstractmethod
    def weight_format(self, layer: str, in_features: int) -> WeightFormat:
        """Format that a layer of ``in_features`` input features will have."""

    def layer_specs(self, layers: Sequence[Mapping[str, nn.Linear]]) -> dict[str, LayerSpec]:
        """Size, and format after quantization, of all layers of some blocks, by full name."""
        return {
            name: LayerSpec(
                out_features=layer.out_features,
                in_features=layer.in_features,
                format=self.weight_format(name, layer.in_features),
            )
            for block in layers
            for name, layer in block.items()
        }

    @abc.abstractmethod
    def cache_key(self) -> dict[str, Any]:
        """JSON-able settings that determine the codes, beside model, calibration tokens and ``version``."""

    @abc.abstractmethod
    def memory(self, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
        """Peak memory of ``quantize_block`` on the largest block."""

    def operations(self, sizes: ModelSizes, tokens: CalibrationTokens) -> float:
        """Estimate of the floating-point operations for all blocks, propagation of the activations included."""
        return 2.0 * sizes.block * sizes.blocks * tokens.total

    def prepare(self) -> None:  # noqa: B027  (optional)
        """Compile the method's functions, before free memory is measured."""
