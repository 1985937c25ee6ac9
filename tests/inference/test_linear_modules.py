"""Modules that count as linear layers: by what they compute, not by their base class."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Llama4TextConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

from matquant.inference.linear_modules import is_linear


class _Renamed(nn.Linear):
    def extra(self) -> None: ...


class _Clamping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-6, 6))


class _Float32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias if self.bias is None else self.bias.float())


class _Rounding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class _Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def _scaled() -> nn.Module:
    layer = _Scaled(8, 4)
    layer.scale = 2.0
    return layer


def _patched() -> nn.Module:
    layer = nn.Linear(8, 4)
    layer.forward = lambda x: F.relu(x)  # type: ignore[method-assign]
    return layer


def _hooked() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(nn.Linear(8, 4), ModelHook())


@pytest.mark.parametrize(
    "module", [nn.Linear(8, 4), _Renamed(8, 4, bias=False), FalconLinear(8, 4), _Scaled(8, 4), _hooked()], ids=repr
)
def test_linear_layers(module: Any) -> None:
    weight = module.weight
    assert is_linear(module)
    assert module.weight is weight
    with torch.device("meta"):
        assert is_linear(module.to("meta"))


@pytest.mark.parametrize(
    "module",
    [
        Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)),
        nn.Bilinear(8, 4, 2),
        _Clamping(8, 4),
        _Float32(8, 4),
        _Rounding(8, 4, bias=False),
        _scaled(),
        _patched(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules(module: Any) -> None:
    assert not is_linear(module)
