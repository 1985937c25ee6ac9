"""Conversion between the tensors of a checkpoint and the buffers of ``NestedLinear``, applied per layer by Transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from matquant.formats import matgptq
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.packed import NestedSpec
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import pack_groups, stored_group_count


def nested_converters(planes: int) -> list[WeightConverter]:
    """Converters for a nested checkpoint whose first ``planes`` planes are read."""
    return [WeightConverter([f"plane{d}" for d in range(planes)], "planes", [StackPlanes()])]


def matgptq_converters(spec: NestedSpec, planes: int) -> list[WeightConverter]:
    """Converters for a MatGPTQ checkpoint whose first ``planes`` planes are kept."""
    return [
        WeightConverter(matgptq.CODES[1:], "planes", [PackCodes(planes)]),
        WeightConverter(matgptq.SCALES[1:], "scales", [PackScales(spec)]),
    ]


class StackPlanes(ConversionOps):
    """Conversion of one tensor per plane to one tensor [planes, ...]."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        first = _single(input_dict[source_patterns[0]])
        stacked = first.new_empty(len(source_patterns), *first.shape)
        del first
        for d, name in enumerate(source_patterns):
            stacked[d] = _single(input_dict.pop(name))  # frees each plane before the next is copied
        return {target_patterns[0]: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitPlanes()


class SplitPlanes(ConversionOps):
    """Conversion of one tensor [planes, ...] to one tensor per plane."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        planes = _single(input_dict[source_patterns[0]])
        return dict(zip(target_patterns, planes.clone().unbind(), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return StackPlanes()


class PackCodes(ConversionOps):
    """Conversion of codes, uint8 [out, in], to planes."""

    def __init__(self, planes: int) -> None:
        self.planes = planes

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        codes = _single(input_dict[source_patterns[0]])
        unit_scales = codes.new_ones(codes.shape[0], 1, dtype=torch.float32)
        # With msb slicing, the argument max_bits of pack is the number of planes.
        fmt = WeightFormat(group_size=codes.shape[1], master_bits=matgptq.MASTER_BITS, scale_dtype=torch.float32)
        weight = NestedWeight(codes=codes, scales=unit_scales, zeros=None, format=fmt)
        return {target_patterns[0]: NestedPlanes.pack(weight, self.planes).planes}


class PackScales(ConversionOps):
    """Conversion of scales [out, groups] to the packed layout."""

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
        groups = stored_group_count(layer.in_features, layer.format.group_size)
        return {target_patterns[0]: pack_groups(_single(input_dict[source_patterns[0]]), groups)}


def _single(tensors: Any) -> Tensor:
    """Only tensor of a pattern: Transformers passes it alone or in a list."""
    tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
    return tensor
