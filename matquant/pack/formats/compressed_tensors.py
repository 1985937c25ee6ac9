"""The format ``pack-quantized`` of compressed-tensors, as llm-compressor writes it and Transformers and vLLM load it.

A layer X with weight [out, in] is stored as X.weight_packed int32 [out, in bits / 32], X.weight_scale [out, groups],
X.weight_shape int64 [2], and where it is not symmetric X.weight_zero_point int32 [out bits / 32, groups].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.formats.groups import group_count
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.pack.formats.integer_format import IntegerFormat, group_size
from matquant.pack.integer_grid import IntegerGrid, IntegerWeight, pack_bits
from matquant.pack.pack_input import PackInput

_WORD = 32


class CompressedTensorsFormat(IntegerFormat):
    """Codes of 2 to 8 bits in words of 32 bits, packed along the input features."""

    name = "compressed_tensors"
    supported = tuple((bits, symmetric) for symmetric in (True, False) for bits in range(2, 9))
    min_zero_point = 0

    def tensors(self, layer: LayerSpec, grid: IntegerGrid) -> dict[str, TensorSpec]:
        rows, columns = layer.out_features, layer.in_features
        groups = group_count(columns, layer.format.group_size)
        found = {
            "weight_packed": TensorSpec((rows, _words(columns, grid.bits)), torch.int32),
            "weight_scale": TensorSpec((rows, groups), layer.format.scale_dtype),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if not grid.symmetric:
            found["weight_zero_point"] = TensorSpec((_words(rows, grid.bits), groups), torch.int32)
        return found

    def encode(self, weight: IntegerWeight) -> dict[str, Tensor]:
        found = {
            "weight_packed": pack_bits(weight.codes, weight.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if not weight.symmetric:
            found["weight_zero_point"] = pack_bits(weight.zeros.t(), weight.bits).t()
        return found

    def config(self, source: PackInput, grids: Mapping[str, IntegerGrid]) -> dict[str, Any]:
        kinds: dict[tuple[int, bool, int], list[str]] = {}
        for name, grid in grids.items():
            kinds.setdefault((grid.bits, grid.symmetric, group_size(source.layers[name])), []).append(name)
        groups = {
            f"group_{index}": _scheme(*kind, targets=["Linear"] if len(kinds) == 1 else names)
            for index, (kind, names) in enumerate(kinds.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(source.unconverted),
            "kv_cache_scheme": None,
        }


def _scheme(bits: int, symmetric: bool, size: int, targets: list[str]) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)
