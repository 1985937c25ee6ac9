"""Toy learned method: the scales of a block are trained by gradient descent on the block's output error.

One Python file and one YAML file (``conf/method/learned_scales.yaml``) are all that this method adds to the project.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from matquant.formats.groups import fit_group_size
from matquant.formats.nested import NestedWeight, WeightFormat
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
from matquant.quantize.config import MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScalesConfig(MethodConfig):
    """Settings of the method: training steps over all batches, and the learning rate of the log-scales."""

    name: str = "learned_scales"
    zero_point_offset: float = 0.0
    steps: int = 3
    learning_rate: float = 1e-2

    def build(self, task: QuantizerTask) -> "LearnedScales":
        return LearnedScales(self, task)


class LearnedScales(BlockQuantizer):
    """Round to nearest, then training of log-scales so that the block's output matches that of the full-precision block."""

    def __init__(self, config: LearnedScalesConfig, task: QuantizerTask) -> None:
        self.config, self.task = config, task
        self.calibration = CalibrationNeeds(bits=(task.master_bits,), full_precision=True)

    def weight_format(self, layer: str, in_features: int) -> WeightFormat:
        group_size = fit_group_size(self.config.group_size_of(layer), in_features)
        return WeightFormat(group_size=group_size, scale_dtype=self.task.scale_dtype)

    def cache_key(self) -> dict[str, Any]:
        return {"learned_scales": [self.config.steps, self.config.learning_rate, self.config.group_size, self.version]}

    def memory(self, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
        return MethodMemory(calibrate=3 * sizes.block * 4, solve=0)

    def quantize_block(self, context: BlockContext) -> BlockResult:
        rounded = {name: self._round(name, layer.weight) for name, layer in context.layers.items()}
        log_scales = {n: w.scales.float().log().requires_grad_() for n, w in rounded.items()}
        optimizer = torch.optim.Adam(list(log_scales.values()), lr=self.config.learning_rate)
        losses = []
        for _ in range(self.config.steps):
            for batch in range(context.batches):
                dense = {n: _dequantize(rounded[n], log_scales[n], self.task.master_bits) for n in rounded}
                hidden = context.inputs(str(self.task.master_bits), batch)
                output = context.forward(hidden, batch, dense)
                loss = (output - context.full_precision_outputs(batch)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        result = BlockResult(notes=[f"block {context.index}: loss {losses[0]:.3e} -> {losses[-1]:.3e}"])
        for name, weight in rounded.items():
            scales = log_scales[name].detach().exp().to(weight.scales.dtype)
            result.weights[name] = dataclasses.replace(weight, scales=scales)
            context.progress(1)
        return result

    def _round(self, name: str, weight: Tensor) -> NestedWeight:
        fmt = self.weight_format(name, weight.shape[1])
        groups = weight.detach().float().view(weight.shape[0], -1, fmt.group_size)  # (out, groups, group_size)
        scales = (groups.abs().amax(-1) / 100).to(
            fmt.scale_dtype
        )  # too short on purpose: training has to lengthen them
        codes = (groups / scales.float()[..., None] + 127.5).round().clamp(0, 255).to(torch.uint8)
        return NestedWeight(codes=codes.view(weight.shape), scales=scales, zeros=None, format=fmt)


def _dequantize(weight: NestedWeight, log_scales: Tensor, bits: int) -> Tensor:
    """Dense weight as a differentiable function of the log-scales."""
    unit = dataclasses.replace(weight, scales=torch.ones_like(weight.scales)).dequantize(bits)
    return unit * log_scales.exp().repeat_interleave(weight.format.group_size, 1)
