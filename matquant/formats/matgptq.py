"""The published MatGPTQ checkpoints (arXiv 2602.03537): what their config says, and what it means here.

    {"quant_method": "matgptq_quant", "group_size": 128, "master_bitwidth": 8, "inference_bitwidth": 4,
     "quant_dtype": "float16", "modules_to_not_convert": ["lm_head", "norm"]}

A layer X has ``X.qweight``, uint8 codes [out, in], and ``X.scales`` [out, in / group_size]; its slices are cut by ``round`` and
are symmetric. The codes hold all planes at once, so a reader cannot fetch fewer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from matquant.errors import UserError
from matquant.formats.nested import WeightFormat
from matquant.formats.packed import LayerSpec, NestedSpec, TensorSpec, check_bits
from matquant.formats.safetensors_headers import StoredTensor

QUANT_METHOD = "matgptq_quant"
MASTER_BITS = 8
CODES, SCALES = ".qweight", ".scales"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatGptqSpec:
    """The config of a published checkpoint; ``group_size`` -1 is one scale per row."""

    group_size: int
    bits: int
    scale_dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        """The content of ``quantization_config``."""
        return {
            "quant_method": QUANT_METHOD,
            "group_size": self.group_size,
            "master_bitwidth": MASTER_BITS,
            "inference_bitwidth": self.bits,
            "quant_dtype": str(self.scale_dtype).removeprefix("torch."),
            "modules_to_not_convert": ["lm_head", "norm"],
        }

    def tensors(self, layers: Mapping[str, LayerSpec]) -> dict[str, TensorSpec]:
        """What is stored of the layers."""
        found = {}
        for name, layer in layers.items():
            found[name + CODES] = TensorSpec((layer.out_features, layer.in_features), torch.uint8)
            groups = layer.in_features // layer.format.group_size
            found[name + SCALES] = TensorSpec((layer.out_features, groups), self.scale_dtype)
        return found

    def nested(self, stored: Mapping[str, StoredTensor]) -> NestedSpec:
        """The same checkpoint as a nested one; its layers are those whose codes the files hold.

        Raises:
            UserError: there are none, or codes or scales have another shape or dtype than the config says.
        """
        layers = {}
        for key, found in stored.items():
            if not key.endswith(CODES):
                continue
            name = key.removesuffix(CODES)
            if len(found.shape) != 2 or not all(found.shape):
                raise UserError(f"{key} is {list(found.shape)}; codes are a matrix, [out, in].")
            rows, columns = found.shape
            size = columns if self.group_size == -1 else self.group_size
            if columns % size:
                raise UserError(f"{key}: groups of {size} do not divide its {columns} input features.")
            layers[name] = layer(rows, columns, size, self.scale_dtype)
        if not layers:
            raise UserError(f"The checkpoint says that it is {QUANT_METHOD}, but holds no codes (*{CODES}).")
        return NestedSpec(layers=layers, bits=self.bits, max_bits=MASTER_BITS)


def layer(out_features: int, in_features: int, group_size: int, scale_dtype: torch.dtype) -> LayerSpec:
    """What a layer of a published checkpoint is."""
    fmt = WeightFormat(group_size=group_size, master_bits=MASTER_BITS, slicing="round", scale_dtype=scale_dtype)
    return LayerSpec(out_features=out_features, in_features=in_features, format=fmt)


def parse(content: Any, where: str = "quantization_config") -> MatGptqSpec:
    """The checked form of ``quantization_config``.

    Raises:
        UserError: names the field that is missing or wrong, and what was found.
    """
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{where} is none of {QUANT_METHOD}.")
    group_size, dtype = content.get("group_size"), content.get("quant_dtype", "float16")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise UserError(f"{where}.group_size must be -1 or a whole number above 0; found {group_size!r}.")
    if content.get("master_bitwidth") != MASTER_BITS:
        raise UserError(
            f"{where}.master_bitwidth must be {MASTER_BITS}, the only one whose slices the format defines; found "
            f"{content.get('master_bitwidth')!r}."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}.quant_dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    bits = check_bits(content.get("inference_bitwidth"), f"{where}.inference_bitwidth", MASTER_BITS)
    return MatGptqSpec(group_size=group_size, bits=bits, scale_dtype=DTYPES[dtype])
