"""Quantizers for tests: groups of 32, no zero-point offset, no coordinate descent."""

from collections.abc import Mapping
from typing import Any

import torch

from matquant.quantize.base import BlockQuantizer, QuantizerTask
from matquant.quantize.gptq.config import GptqConfig
from matquant.quantize.rtn.config import RtnConfig


def gptq(
    lambdas: Mapping[int, float],
    bits: tuple[int, ...] = (2, 8),
    *,
    asymmetric: bool = True,
    true_sequential: bool = True,
) -> BlockQuantizer:
    """GPTQ with a stream of hidden states for each of ``bits``."""
    config = GptqConfig(
        group_size=32,
        block_size=32,
        zero_point_offset=0.0,
        cd_passes=0,
        calibration_bits=bits,
        asymmetric_calibration=asymmetric,
        true_sequential=true_sequential,
    )
    return config.build(QuantizerTask.of(lambdas, 8, torch.float32))


def rtn(lambdas: Mapping[int, float] | None = None, **settings: Any) -> BlockQuantizer:
    """Round to nearest with msb slices and a scale search."""
    config = RtnConfig(**{"slicing": "msb", "scale": "search", "group_size": 32} | settings)
    return config.build(QuantizerTask.of(lambdas or {config.master_bits: 1.0}, config.master_bits, torch.float32))
