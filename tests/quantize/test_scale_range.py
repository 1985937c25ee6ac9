"""Scales that float16 cannot hold: layers without any usable scale are refused early, groups that underflow are named."""

import pytest
import torch
from quantizers import gptq, rtn
from torch import nn

from matquant.errors import UserError
from matquant.formats.nested import WeightFormat
from matquant.quantize.base import BlockQuantizer, QuantizerTask
from matquant.quantize.gptq.options import LayerOptions
from matquant.quantize.gptq.solver import solve
from matquant.quantize.layer_selection import check_errors, check_scales, check_weight_range, float_weight
from matquant.quantize.rtn.config import RtnConfig


def solved(weight: torch.Tensor, dtype: torch.dtype = torch.float32, **settings):
    config = RtnConfig(**{"slicing": "msb", "scale": "search", "group_size": 32} | settings)
    task = QuantizerTask.of({config.master_bits: 1.0}, config.master_bits, dtype)
    return solve(weight, None, LayerOptions.of(config, task, scale=config.scale, cd_passes=0).of_layer("x"))


def weight_of(size: float) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * size


@pytest.mark.parametrize(
    ("largest", "master_bits", "dtype", "word"),
    [
        (1e-9, 8, torch.float16, "little"),
        (1e-8, 4, torch.float16, "little"),
        (1e9, 8, torch.float16, "much"),
        (1e7, 2, torch.float16, "much"),
        (1e-42, 8, torch.bfloat16, "little"),
    ],
)
def test_a_layer_without_any_usable_scale_is_refused(largest, master_bits, dtype, word):
    weight_format = WeightFormat(group_size=32, master_bits=master_bits, scale_dtype=dtype)
    with pytest.raises(UserError, match=rf"weights of a\.b reach .*, too {word} for scales in {str(dtype)[6:]}"):
        check_weight_range("a.b", largest, weight_format)


@pytest.mark.parametrize("largest", [0.0, 1e-5, 1e-3, 1.0, 1e4, 6e4])
def test_a_layer_with_usable_scales_is_accepted(largest):
    check_weight_range("a.b", largest, WeightFormat(group_size=32))
    check_weight_range("a.b", largest, WeightFormat(group_size=32, scale_dtype=torch.bfloat16))


@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"master_bits": 4}, {"slicing": "round"}])
def test_groups_that_underflow_are_counted(settings):
    weight = weight_of(0.02)
    weight[1, :32] *= 1e-8
    weight[3, 32:] *= 1e-9
    weight[2, :32] = 0  # loses nothing
    (note,) = check_scales("a.b", weight, solved(weight, **settings))
    assert note.startswith("2 of 8 groups of a.b have weights of at most ")
    assert "underflow float16" in note
    assert check_scales("a.b", weight, solved(weight, torch.bfloat16, **settings)) == []
    assert check_scales("a.b", weight_of(0.02), solved(weight_of(0.02), **settings)) == []


@pytest.mark.parametrize("quantizer", [rtn(), gptq({2: 1.0, 8: 1.0})])
def test_the_formats_of_all_methods_are_checked(quantizer: BlockQuantizer):
    with pytest.raises(UserError, match="too little"):
        check_weight_range("a.b", 1e-10, quantizer.weight_format("a.b", 64))


def test_scales_that_overflow_after_the_solve_are_refused():
    weight = weight_of(1e7)
    with pytest.raises(UserError, match=r"weights of a\.b reach 3.4.e\+07, too much for scales in float16"):
        check_scales("a.b", weight, solved(weight))


def test_an_error_that_is_not_a_number_is_refused():
    check_errors("a.b", {"2": 0.5, "8": 0.0})
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"error of a\.b at 2 bits is not finite"):
            check_errors("a.b", {"2": value, "8": 0.0})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = value
    with pytest.raises(UserError, match=r"weights a\.b\.weight hold NaN or Inf"):
        float_weight("a.b", layer, torch.device("cpu"))
