"""Published MatGPTQ checkpoint (arXiv 2602.03537): ``quantization_config`` and stored tensors.

    {"quant_method": "matgptq_quant", "group_size": 128, "master_bitwidth": 8, "inference_bitwidth": 4,
     "quant_dtype": "float16", "modules_to_not_convert": ["lm_head", "norm"]}

A layer X has ``X.qweight``, uint8 codes [out, in], and ``X.scales`` [out, in / group_size]. Its slices use ``round`` slicing
and are symmetric. The codes hold all planes together, so a reader cannot fetch fewer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from matquant.errors import UserError
from matquant.formats.bits import check_bits
from matquant.formats.groups import WHOLE_ROW, group_count
from matquant.formats.nested import SCALE_DTYPES, WeightFormat
from matquant.formats.packed import LayerSpec, NestedSpec, TensorSpec
from matquant.formats.safetensors_headers import StoredTensor

QUANT_METHOD = "matgptq_quant"
MASTER_BITS = 8
CODES, SCALES = ".qweight", ".scales"
DTYPES = {name: SCALE_DTYPES[name] for name in ("float16", "bfloat16")}  # of the scales


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatGptqSpec:
    """Description of a published checkpoint, which does not list its layers.

    Attributes:
        group_size: input features per scale; -1 for one scale per row.
        bits: default bit-width of a reader.
        scale_dtype: float16 or bfloat16.
    """

    group_size: int
    bits: int
    scale_dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        """Content of ``quantization_config``."""
        return {
            "quant_method": QUANT_METHOD,
            "group_size": self.group_size,
            "master_bitwidth": MASTER_BITS,
            "inference_bitwidth": self.bits,
            "quant_dtype": str(self.scale_dtype).removeprefix("torch."),
            "modules_to_not_convert": ["lm_head", "norm"],
        }

    def layer_spec(self, name: str, out_features: int, in_features: int) -> LayerSpec:
        """Specification of the layer ``name``. Raises UserError if groups do not divide ``in_features``."""
        size = in_features if self.group_size == WHOLE_ROW else self.group_size
        if in_features % size:
            raise UserError(f"{name}: groups of {size} do not divide its {in_features} input features.")
        fmt = WeightFormat(group_size=size, master_bits=MASTER_BITS, slicing="round", scale_dtype=self.scale_dtype)
        return LayerSpec(out_features=out_features, in_features=in_features, format=fmt)

    def tensors(self, layers: Mapping[str, LayerSpec]) -> dict[str, TensorSpec]:
        """Stored tensors of the layers, by name."""
        found = {}
        for name, layer in layers.items():
            found[name + CODES] = TensorSpec((layer.out_features, layer.in_features), torch.uint8)
            groups = group_count(layer.in_features, layer.format.group_size)
            found[name + SCALES] = TensorSpec((layer.out_features, groups), self.scale_dtype)
        return found

    def to_nested_spec(self, stored: Mapping[str, StoredTensor]) -> NestedSpec:
        """Description of the same checkpoint as a nested one. Its layers are those with stored codes.

        Args:
            stored: tensors of the files, by name.

        Raises:
            UserError: there are no codes, or codes that are no matrix or that groups do not divide.
        """
        layers = {}
        for key, tensor in stored.items():
            if key.endswith(CODES):
                if len(tensor.shape) != 2 or not all(tensor.shape):
                    raise UserError(f"{key} must be a matrix of codes [out, in]; found {list(tensor.shape)}.")
                name = key.removesuffix(CODES)
                layers[name] = self.layer_spec(name, *tensor.shape)
        if not layers:
            raise UserError(f"The checkpoint has quant_method {QUANT_METHOD}, but its files hold no codes (*{CODES}).")
        return NestedSpec(layers=layers, bits=self.bits, max_bits=MASTER_BITS)


def parse_matgptq_config(content: Any, where: str = "quantization_config") -> MatGptqSpec:
    """Parse and check the ``quantization_config`` of a published checkpoint.

    Raises:
        UserError: names the field that is missing or wrong, and the value found.
    """
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{where} has no quant_method {QUANT_METHOD!r}.")
    group_size, dtype = content.get("group_size"), content.get("quant_dtype", "float16")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise UserError(f"{where}.group_size must be -1 or a whole number above 0; found {group_size!r}.")
    if content.get("master_bitwidth") != MASTER_BITS:
        raise UserError(
            f"{where}.master_bitwidth must be {MASTER_BITS}, the only value for which the format defines slices; found "
            f"{content.get('master_bitwidth')!r}."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}.quant_dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    bits = check_bits(content.get("inference_bitwidth"), f"{where}.inference_bitwidth", MASTER_BITS)
    return MatGptqSpec(group_size=group_size, bits=bits, scale_dtype=DTYPES[dtype])
