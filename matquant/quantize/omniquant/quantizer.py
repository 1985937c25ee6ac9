"""MatQuant on OmniQuant as a block quantizer: gradient descent on the range of each group, for all slices of a block."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from matquant.calibration.activation_streams import FULL
from matquant.errors import UserError
from matquant.formats.groups import fit_group_size
from matquant.formats.nested import WeightFormat
from matquant.memory import FLOAT32_BYTES
from matquant.models.model_sizes import ModelSizes
from matquant.quantize.base import (
    BlockContext,
    BlockQuantizer,
    BlockResult,
    CalibrationNeeds,
    CalibrationTokens,
    MethodMemory,
    QuantizerTask,
)
from matquant.quantize.layer_selection import check_scales, float_weight
from matquant.quantize.omniquant.config import OmniQuantConfig
from matquant.quantize.straight_through import MinMaxGrid, group_ranges

_START = 4.0  # logit of the share of a range that is kept, as in OmniQuant's public code: 0.982
_WEIGHT_ARRAYS = (
    10  # float32 arrays of the block's weights: weights, intermediate results of one slice, their gradients
)
_GRADIENTS = 3  # activations of a block with their gradients, over the activations alone

logger = logging.getLogger(__name__)


class OmniQuantizer(BlockQuantizer):
    """Training of the clipping of each group (arXiv 2308.13137) on the objective of MatQuant (arXiv 2502.06786, equation 7)."""

    calibration: CalibrationNeeds
    depends_on_batch_size = True

    def __init__(self, config: OmniQuantConfig, task: QuantizerTask) -> None:
        self.config, self.task = config, task
        self.bits = tuple(sorted(task.lambdas, reverse=True))
        if missing := set(config.distilled_bits) - set(self.bits):
            raise UserError(
                f"method.distilled_bits names {min(missing)}, which has no weight in the objective; it weighs "
                f"{sorted(self.bits)}."
            )
        streams = self.stream_bits if config.inputs == "quantized" else ()
        self.calibration = CalibrationNeeds(bits=tuple(sorted(streams)), full_precision=True)

    @property
    def stream_bits(self) -> set[int]:
        """Bit-widths whose slices are run: those of the objective, and the target of distilled ones."""
        return {*self.bits, *([self.task.master_bits] if self.config.distilled_bits else ())}

    def quantize_block(self, context: BlockContext) -> BlockResult:
        if context.process_group.world_size > 1:
            raise UserError(
                f"method={self.config.name} takes one optimizer step after the other, which processes cannot share. Start the "
                "job without torchrun."
            )
        return BlockTraining(self, context).run() if context.layers else BlockResult()

    def weight_format(self, layer: str, in_features: int) -> WeightFormat:
        return WeightFormat(
            group_size=fit_group_size(self.config.group_size_of(layer), in_features),
            master_bits=self.task.master_bits,
            slicing="round",
            has_zero_points=True,
            scale_dtype=self.task.scale_dtype,
        )

    def cache_key(self) -> dict[str, Any]:
        config = self.config
        own = {name: config.group_size_of(name) for name in self.task.layers}
        settings = {
            "lambdas": {str(bits): weight for bits, weight in self.task.lambdas.items()},
            "master_bits": self.task.master_bits,
            "scale_dtype": str(self.task.scale_dtype),
            "group_size": config.group_size,
            "group_sizes": {name: size for name, size in own.items() if size != config.group_size},
            "epochs": config.epochs,
            "learning_rate": config.learning_rate,
            "inputs": config.inputs,
            "distilled_bits": sorted(config.distilled_bits),
            "distill_only": config.distill_only,
        }
        return {"omniquant": settings, "solver": self.version}

    def memory(self, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
        weights = sum(layer.rows * layer.columns for layer in sizes.layers) * FLOAT32_BYTES
        outputs = (2 + bool(self.config.distilled_bits)) * tokens.batch * sizes.hidden * FLOAT32_BYTES
        activations = _GRADIENTS * sizes.activation_bytes(tokens.batch)
        return MethodMemory(calibrate=_WEIGHT_ARRAYS * weights + activations + outputs, solve=0)

    def operations(self, sizes: ModelSizes, tokens: CalibrationTokens) -> float:
        # A forward and a backward pass for each bit-width, a forward pass for each kind of targets.
        passes = self.config.epochs * (3 * len(self.bits) + 1 + bool(self.config.distilled_bits))
        return 2.0 * sizes.block * sizes.blocks * tokens.total * (passes + len(self.calibration.streams))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClippedWeight:
    """Weight of a layer, and the shares of its groups' ranges that are kept.

    Attributes:
        weight: float32 [rows, in_features].
        lowest, highest: float32 [rows, groups], ends of the whole ranges.
        upper, lower: float32 [rows, groups], logits of the shares of ``highest`` (gamma) and ``lowest`` (beta); trained.
        format: of the stored weight.
    """

    weight: Tensor
    lowest: Tensor
    highest: Tensor
    upper: Tensor
    lower: Tensor
    format: WeightFormat

    @classmethod
    def of(cls, weight: Tensor, format: WeightFormat) -> "ClippedWeight":
        """Weight with the clipping from which training starts."""
        lowest, highest = group_ranges(weight, format.group_size)
        upper, lower = (torch.full_like(lowest, _START).requires_grad_() for _ in range(2))
        return cls(weight=weight, lowest=lowest, highest=highest, upper=upper, lower=lower, format=format)

    def grid(self) -> MinMaxGrid:
        """Grid of the clipped ranges."""
        return MinMaxGrid.of_ranges(
            self.lower.sigmoid() * self.lowest, self.upper.sigmoid() * self.highest, self.format
        )

    def slice(self, bits: int) -> Tensor:
        """Dense weight at ``bits`` bits: float32 [rows, in_features], differentiable in ``upper`` and ``lower``."""
        grid = self.grid()
        return grid.slice(grid.codes(self.weight), bits, self.weight.shape[1])


class BlockTraining:
    """Training of the clipping of one block.

    Attributes:
        layers: clipped weight of each layer, by full name.
    """

    def __init__(self, quantizer: OmniQuantizer, context: BlockContext) -> None:
        self.quantizer, self.context, self.config = quantizer, context, quantizer.config
        self.layers = {
            name: ClippedWeight.of(
                float_weight(name, layer, context.device), quantizer.weight_format(name, layer.in_features)
            )
            for name, layer in context.layers.items()
        }
        self._parameters = [logits for one in self.layers.values() for logits in (one.upper, one.lower)]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self.config.learning_rate, weight_decay=0.0)

    def run(self) -> BlockResult:
        """Train, and quantize with the clipping of the last step.

        Raises:
            UserError: the loss is not finite.
        """
        with self.context.timer.timed("solve"):
            losses = [self._run_epoch() for _ in range(self.config.epochs)]
        logger.info(
            "block %d: loss %.3e in the first epoch, %.3e in the last", self.context.index, losses[0], losses[-1]
        )
        result = BlockResult()
        for name, one in self.layers.items():
            with torch.no_grad():
                grid = one.grid()
                quantized = grid.to_nested(grid.codes(one.weight), one.weight.shape[1])
            result.notes.extend(check_scales(name, one.weight, quantized))
            result.weights[name] = quantized.to("cpu")
            self.context.progress(1)
        return result

    def _run_epoch(self) -> float:
        """Take an optimizer step for each batch; return the mean loss."""
        total = 0.0
        for batch in range(self.context.batches):
            loss, gradients = self.loss_and_gradients(batch)
            if not math.isfinite(loss):
                raise UserError(
                    f"The loss of block {self.context.index} is not finite in batch {batch}. Lower method.learning_rate="
                    f"{self.config.learning_rate:g}, or check the model and the calibration text."
                )
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()
            total += loss
        return total / self.context.batches

    def loss_and_gradients(self, batch: int) -> tuple[float, list[Tensor | None]]:
        """Weighted loss of a batch, and the gradients of the logits, layer by layer, ``upper`` first.

        A gradient is None for a layer that the batch does not reach: an expert without tokens.
        """
        lambdas, config = self.quantizer.task.lambdas, self.config
        full = self.context.full_precision_outputs(batch).float()
        wide = self._wide_output(batch) if config.distilled_bits else full
        total = 0.0
        sums: list[Tensor | None] = [None] * len(self._parameters)
        for bits in self.quantizer.bits:
            output = self._output(bits, batch)
            distilled = bits in config.distilled_bits
            targets = [full] * (not (distilled and config.distill_only)) + [wide] * distilled
            loss = lambdas[bits] * sum((F.mse_loss(output, target) for target in targets), output.new_zeros(()))
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            sums = [_added(one, other) for one, other in zip(sums, found, strict=True)]
            total += loss.item()
        return total, sums

    def _output(self, bits: int, batch: int) -> Tensor:
        """Output of the block with the slice of ``bits`` bits: float32 [batch, length, hidden]."""
        stream = FULL if self.config.inputs == "full_precision" else str(bits)
        weights: Mapping[str, Tensor] = {name: one.slice(bits) for name, one in self.layers.items()}
        return self.context.forward(self.context.inputs(stream, batch), batch, weights).float()

    @torch.no_grad()
    def _wide_output(self, batch: int) -> Tensor:
        """Output at all bits of the codes, a target of co-distillation."""
        return self._output(self.quantizer.task.master_bits, batch)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Sum of two gradients, each of which may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
