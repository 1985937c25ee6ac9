"""Three fused layers with one input, and the launches of their calls."""

from typing import Any

import torch
from torch import Tensor, nn
from weights import make_weight

from matquant.formats.nested import NestedWeight
from matquant.inference import NestedLinear
from matquant.inference.model_surgery import fuse_layers

COLUMNS, GROUP = 192, 64
ROWS = (128, 70, 64)
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three layers with one input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for name, layer in zip(NAMES, layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def make_attention(rows=ROWS, biases=(False, True, True), **options: Any) -> tuple[Attention, list[NestedWeight]]:
    """Fused layers on the CPU, and their weights."""
    weights = [make_weight(count, COLUMNS, GROUP, seed=i, **options) for i, count in enumerate(rows)]
    layers = [
        NestedLinear.from_planes(weight, torch.randn(len(weight.codes)) if has_bias else None)
        for weight, has_bias in zip(weights, biases, strict=True)
    ]
    attention = Attention(*layers)
    assert len(fuse_layers(attention, ["cpu"])) == 1
    return attention, weights


def expected(attention: Attention, x: Tensor, weights: list[NestedWeight], bits: Any) -> list[Tensor]:
    layers = [attention.get_submodule(name) for name in NAMES]
    return [
        nn.functional.linear(x, weight.dequantize(width).to(x.dtype), layer.bias)
        for layer, weight, width in zip(layers, weights, bits, strict=True)
    ]


def assert_near(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


TOGETHER, SEPARATE = [(320, 8)], [(128, 8), (70, 8), (64, 8)]


def calls(attention: Attention, x: Tensor, launches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Launches of one forward pass."""
    launches.clear()
    attention(x)
    return list(launches)
