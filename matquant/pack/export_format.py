"""Base class of the stock formats that ``export`` writes."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.pack.integer_grid import Grid, IntegerWeight
from matquant.pack.pack_input import PackInput

# What vLLM puts into one matrix, which has codes of one kind, and what it calls that.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Format(ABC):
    """A stock format.

    Attributes:
        name: of the config group.
        supported: (bits, symmetric) of its codes, the best first.
        least_zero: the smallest zero point that it can store.
    """

    name: str
    supported: tuple[tuple[int, bool], ...]
    least_zero: int

    @abstractmethod
    def tensors(self, layer: LayerSpec, grid: Grid) -> dict[str, TensorSpec]:
        """Specs of a layer's tensors, by the last part of their name.

        Raises:
            UserError: the format cannot hold the shape.
        """

    @abstractmethod
    def encode(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """Tensors of a layer, with the names and shapes of ``tensors``."""

    @abstractmethod
    def config(self, source: PackInput, grids: Mapping[str, Grid]) -> dict[str, Any]:
        """``quantization_config``."""


def group_size(layer: LayerSpec) -> int:
    """-1 for one group a row, as both formats write it."""
    return -1 if layer.format.group_size == layer.in_features else layer.format.group_size


def name_pattern(name: str) -> str:
    """A regular expression for a layer's name, and for the name of the fused one that it is part of in vLLM."""
    owner, _, last = name.rpartition(".")
    names = f"({last}|{FUSED[last]})" if last in FUSED else re.escape(last)
    return f"^{re.escape(owner)}\\.{names}$" if owner else f"^{names}$"
