"""The GPTQ format, version 1, as GPTQModel, Transformers and vLLM load it.

A layer X with weight [out, in] is stored as X.qweight int32 [in bits / 32, out], X.qzeros int32 [groups, out bits / 32] with
zero points less one, X.scales [groups, out], and X.g_idx int32 [in], the group of each input feature.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.groups import group_count, group_index
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.pack.config import PackConfig
from matquant.pack.formats.integer_format import IntegerFormat, group_size, name_pattern
from matquant.pack.integer_grid import IntegerGrid, IntegerWeight, pack_bits
from matquant.pack.pack_input import PackInput
from matquant.quantize.config import MethodConfig
from matquant.version import version

_BITS = (2, 3, 4, 8)
_WORD = 32


class GptqFormat(IntegerFormat):
    """Codes of 2, 3, 4 or 8 bits in words of 32 bits, packed along the input features."""

    name = "gptq"
    supported = tuple((bits, symmetric) for symmetric in (True, False) for bits in _BITS)
    min_zero_point = 1  # since they are stored less one

    def check(self, config: PackConfig, method: MethodConfig, layers: Mapping[str, LayerSpec]) -> None:
        """Refuse layers whose codes or zero points do not fill whole words, and those whose last group is shorter."""
        for name, layer in layers.items():
            if layer.out_features % _WORD or layer.in_features % _WORD:
                raise UserError(
                    f"pack=gptq holds layers whose sizes are multiples of {_WORD}; {name} is [{layer.out_features}, "
                    f"{layer.in_features}]. Leave such layers out (method.skip), or use pack=compressed_tensors or "
                    "pack=nested."
                )
        super().check(config, method, layers)

    def tensors(self, layer: LayerSpec, grid: IntegerGrid) -> dict[str, TensorSpec]:
        rows, columns = layer.out_features, layer.in_features
        groups = group_count(columns, layer.format.group_size)
        return {
            "qweight": TensorSpec((columns * grid.bits // _WORD, rows), torch.int32),
            "qzeros": TensorSpec((groups, rows * grid.bits // _WORD), torch.int32),
            "scales": TensorSpec((groups, rows), layer.format.scale_dtype),
            "g_idx": TensorSpec((columns,), torch.int32),
        }

    def encode(self, weight: IntegerWeight) -> dict[str, Tensor]:
        columns, groups = weight.codes.shape[1], weight.scales.shape[1]
        return {
            "qweight": pack_bits(weight.codes, weight.bits).t(),
            "qzeros": pack_bits(weight.zeros.t() - 1, weight.bits),
            "scales": weight.scales.t(),
            "g_idx": group_index(columns, columns // groups).int(),
        }

    def config(self, source: PackInput, grids: Mapping[str, IntegerGrid]) -> dict[str, Any]:
        about = {name: _about(source.layers[name], grid) for name, grid in grids.items()}
        common = dict(Counter(tuple(own.items()) for own in about.values()).most_common(1)[0][0])
        dynamic: dict[str, dict[str, Any]] = {}
        for name, own in about.items():
            if own != common:
                dynamic[f"+:{name_pattern(name)}"] = own
        for name in source.unconverted:
            if "." in name:  # the output head has an entry of its own
                dynamic[f"-:{name_pattern(name)}"] = {}
        return {
            "quant_method": "gptq",
            **common,
            "desc_act": False,
            "lm_head": "lm_head" in grids,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"matquant:{version()}"]},
        } | ({"dynamic": dynamic} if dynamic else {})


def _about(layer: LayerSpec, grid: IntegerGrid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": group_size(layer), "sym": grid.symmetric}
