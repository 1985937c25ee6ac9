"""Base class of the formats that hold one slice in integer codes, which stock runtimes load without this project."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from matquant.errors import UserError
from matquant.formats.groups import WHOLE_ROW
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.shard_index import INDEX
from matquant.pack.config import PackConfig
from matquant.pack.formats.base import CheckpointFormat, PackRequest, PackResult, check_equal_groups
from matquant.pack.grid_choice import FUSED, GridChoice, SliceLayers, choose_grids
from matquant.pack.integer_grid import IntegerGrid, IntegerWeight, nearest, on_grid, zero_points
from matquant.pack.pack_input import PackInput
from matquant.pack.shards import ShardWriter, aligned
from matquant.quantize.config import MethodConfig


class IntegerFormat(CheckpointFormat):
    """Format of integer codes with a scale, and where it is not symmetric a zero point, for each group.

    Attributes:
        supported: kinds of codes as (bits, symmetric), the best first.
        min_zero_point: smallest zero point that can be stored.
    """

    supported: ClassVar[tuple[tuple[int, bool], ...]]
    min_zero_point: ClassVar[int]

    @abstractmethod
    def tensors(self, layer: LayerSpec, grid: IntegerGrid) -> dict[str, TensorSpec]:
        """Specs of a layer's tensors, by the last part of their name."""

    @abstractmethod
    def encode(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """Tensors of a layer, with the names and shapes of ``tensors``."""

    @abstractmethod
    def config(self, source: PackInput, grids: Mapping[str, IntegerGrid]) -> dict[str, Any]:
        """``quantization_config`` of the checkpoint."""

    def check(self, config: PackConfig, method: MethodConfig, layers: Mapping[str, LayerSpec]) -> None:
        """Refuse layers whose last group is shorter: vLLM rejects them in both formats, compressed-tensors in its own."""
        check_equal_groups(self.name, layers)

    def write(self, request: PackRequest) -> PackResult:
        """Write one slice; a slice that is not exact is refused before anything is written."""
        from matquant.pack.formats import FORMATS  # the registry imports this module

        source, bits = request.source, request.bits
        self._check_experts(source)
        by_layer = dict.fromkeys(source.layers, bits) if isinstance(bits, int) else dict(bits)
        layers = SliceLayers(specs=source.layers, zero_points=_zero_points(source), bits=by_layer)
        choice = choose_grids(
            layers,
            self,
            request.stored_bits,
            allow_nearest=request.allow_nearest,
            alternatives=[one for one in FORMATS.values() if isinstance(one, IntegerFormat)],
        )
        errors = self._write_files(request, layers, choice)
        return PackResult(
            quantization_config=self.config(source, choice.grids), record=_record(request.bits, choice, errors)
        )

    def _write_files(self, request: PackRequest, layers: SliceLayers, choice: GridChoice) -> dict[str, float]:
        """Write the weight files and their index. Returns the relative error of each inexact layer."""
        source, dense = request.source, aligned(request.source.dense)
        section = {
            f"{name}.{kind}": spec
            for name, grid in choice.grids.items()
            for kind, spec in self.tensors(layers.specs[name], grid).items()
        }
        errors: dict[str, float] = {}
        with ShardWriter(request.folder, [section | dict(dense)], request.file_bytes) as files:
            for name, weight in source.weights():
                bits, grid = layers.bits[name], choice.grids[name]
                weight = weight.for_bits(bits)
                if name in choice.inexact:
                    stored = nearest(weight, bits, grid.bits)
                    errors[name] = _relative_error(weight, bits, stored)
                else:
                    stored = on_grid(weight, bits, grid, self.min_zero_point)
                for kind, tensor in self.encode(stored).items():
                    files.write(f"{name}.{kind}", tensor)
                request.progress(1)
            for name in dense:
                files.write(name, source.read(name))
            files.write_index(INDEX)
        return errors

    def _check_experts(self, source: PackInput) -> None:
        if any(origin.expert is not None for origin in source.origins.values()):
            raise UserError(
                f"pack={self.name} does not hold mixtures of experts yet, whose matrices Transformers keeps in one tensor. "
                "Use pack=nested, which Transformers and vLLM load with this project installed."
            )


def group_size(layer: LayerSpec) -> int:
    """Group size as stock configs write it: -1 for one group per row."""
    return WHOLE_ROW if layer.format.group_size == layer.in_features else layer.format.group_size


def name_pattern(name: str) -> str:
    """Regular expression for a layer's name, and for the fused layer that it is part of in vLLM."""
    owner, _, last = name.rpartition(".")
    names = f"({last}|{FUSED[last]})" if last in FUSED else re.escape(last)
    return f"^{re.escape(owner)}\\.{names}$" if owner else f"^{names}$"


def _zero_points(source: PackInput) -> dict[str, list[float]]:
    """Different zero points of each layer. Weights are read only if their groups have zero points of their own."""
    if any(spec.format.has_zero_points for spec in source.layers.values()):
        return {name: zero_points(weight).unique().tolist() for name, weight in source.weights()}
    return {name: [s.format.zero_point] for name, s in source.layers.items()}


def _relative_error(weight: NestedWeight, bits: int, stored: IntegerWeight) -> float:
    """Norm of the difference between stored codes and slice, over the norm of the slice."""
    exact = weight.dequantize(bits)
    norm = exact.norm().item()
    return (stored.dequantize() - exact).norm().item() / norm if norm else 0.0


def _record(bits: int | Mapping[str, int], choice: GridChoice, errors: Mapping[str, float]) -> dict[str, Any]:
    kinds = {(g.bits, g.symmetric) for g in choice.grids.values()}
    return {
        "bits": bits if isinstance(bits, int) else "allocation",
        "stored": [{"bits": b, "symmetric": symmetric} for b, symmetric in sorted(kinds)],
        "exact": not choice.inexact,
        "error": {"mean": sum(errors.values()) / len(errors), "largest": max(errors.values())} if errors else None,
    }
