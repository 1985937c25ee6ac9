"""Round to nearest: codes of the least weighted rounding error, without calibration."""

import functools
from typing import Any

import torch

from matquant.formats.nested import WeightFormat
from matquant.models.model_sizes import ModelSizes
from matquant.quantize.base import (
    BlockContext,
    BlockQuantizer,
    BlockResult,
    CalibrationTokens,
    MethodMemory,
    QuantizerTask,
)
from matquant.quantize.gptq.memory import uncalibrated_memory
from matquant.quantize.gptq.options import LayerOptions
from matquant.quantize.gptq.solver import compile_column_solver, solve
from matquant.quantize.layer_selection import check_scales, float_weight
from matquant.quantize.rtn.config import RtnConfig


class RtnQuantizer(BlockQuantizer):
    """Rounding of each layer on its own."""

    version = 4

    def __init__(self, config: RtnConfig, task: QuantizerTask) -> None:
        self.options = LayerOptions.of(config, task, scale=config.scale, cd_passes=0)

    def prepare(self) -> None:
        compile_column_solver()

    @torch.no_grad()
    def quantize_block(self, context: BlockContext) -> BlockResult:
        result = BlockResult()
        for name, layer in context.layers.items():
            weight = float_weight(name, layer, context.solver_device)
            own = weight[context.process_group.shard(len(weight))]
            with context.timer.timed("solve"):
                solved = solve(own, None, self.options.of_layer(name))
            gather = functools.partial(context.process_group.all_gather_rows, rows=len(weight))
            solved = solved.map_tensors(gather)
            result.notes.extend(check_scales(name, weight, solved))
            result.weights[name] = solved.to("cpu")
            context.progress(1)
        return result

    def weight_format(self, layer: str, in_features: int) -> WeightFormat:
        return self.options.of_layer(layer).weight_format(in_features)

    def cache_key(self) -> dict[str, Any]:
        return self.options.cache_key() | {"streams": None, "solver": self.version}

    def memory(self, sizes: ModelSizes, tokens: CalibrationTokens) -> MethodMemory:
        return MethodMemory(calibrate=0, solve=uncalibrated_memory(sizes, len(self.options.default.bits)))
