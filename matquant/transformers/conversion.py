"""From the tensors of a checkpoint to the buffers of ``NestedLinear`` and back, as Transformers applies it to each layer."""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from matquant.formats import matgptq
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.packed import NestedSpec
from matquant.formats.planes import NestedPlanes, group_count
from matquant.formats.tile_layout import pack_groups


def nested_converters(planes: int) -> list[WeightConverter]:
    """For a nested checkpoint, of which the first so many planes are read."""
    return [WeightConverter([f"plane{d}" for d in range(planes)], "planes", [StackPlanes()])]


def published_converters(spec: NestedSpec, planes: int) -> list[WeightConverter]:
    """For a published checkpoint, of which the first so many planes are kept."""
    return [
        WeightConverter(matgptq.CODES[1:], "planes", [PackCodes(planes)]),
        WeightConverter(matgptq.SCALES[1:], "scales", [PackScales(spec)]),
    ]


class StackPlanes(ConversionOps):
    """One tensor [planes, ...] from a tensor for each plane."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        first = _one(input_dict[source_patterns[0]])
        stacked = first.new_empty(len(source_patterns), *first.shape)
        del first
        for d, name in enumerate(source_patterns):
            stacked[d] = _one(input_dict.pop(name))  # each is let go before the next is copied
        return {target_patterns[0]: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitPlanes()


class SplitPlanes(ConversionOps):
    """A tensor for each plane from one tensor [planes, ...]."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        planes = _one(input_dict[source_patterns[0]])
        return dict(zip(target_patterns, planes.clone().unbind(), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return StackPlanes()


class PackCodes(ConversionOps):
    """Planes from codes, uint8 [out, in]."""

    def __init__(self, planes: int) -> None:
        self.planes = planes

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        codes = _one(input_dict[source_patterns[0]])
        unscaled = codes.new_ones(codes.shape[0], 1, dtype=torch.float32)
        # Sliced by msb, so that max_bits counts planes.
        fmt = WeightFormat(group_size=codes.shape[1], master_bits=matgptq.MASTER_BITS, scale_dtype=torch.float32)
        weight = NestedWeight(codes=codes, scales=unscaled, zeros=None, format=fmt)
        return {target_patterns[0]: NestedPlanes.pack(weight, self.planes).planes}


class PackScales(ConversionOps):
    """Scales in the order of the planes from scales [out, groups]."""

    def __init__(self, spec: NestedSpec) -> None:
        self.spec = spec

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        layer = self.spec.layers[full_layer_name.rpartition(".")[0]]
        groups = group_count(layer.in_features, layer.format.group_size)
        return {target_patterns[0]: pack_groups(_one(input_dict[source_patterns[0]]), groups)}


def _one(found: Any) -> Tensor:
    return found[0] if isinstance(found, list) else found
