"""Literal content of files of version 0.1.0, which every later version must read. See ``test_allocation`` for allocations."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from matquant.errors import UserError
from matquant.formats.nested import WeightFormat
from matquant.formats.packed import LayerSpec, NestedSpec, parse_nested_config
from matquant.formats.parent import read_block
from matquant.store.files import FileRecord
from matquant.store.tensor_files import read_tensors

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "matquant",
    "format_version": 1,
    "bits": 4,
    "layer_bits": {"model.layers.0.mlp.up_proj": 3},
    "prefill_bits": 8,
    "max_bits": 8,
    "master_bits": 8,
    "slicing": "msb",
    "offset": 8.0,
    "zeros": False,
    "group_size": 64,
    "scale_dtype": "float16",
    "layers": {
        "model.layers.0.mlp.up_proj": {"shape": [128, 256]},
        "model.layers.0.mlp.gate_proj": {"shape": [128, 256]},
        "model.layers.0.mlp.down_proj": {
            "shape": [64, 256],
            "master_bits": 6,
            "slicing": "round",
            "offset": 0.0,
            "zeros": True,
            "group_size": -1,
            "scale_dtype": "bfloat16",
        },
    },
    "modules_to_not_convert": ["lm_head"],
    "plane_indices": [2, 3],
    "files": {"model-00001-of-00001.safetensors": {"sha256": "ab" * 32, "bytes": 4096}},
    "seal": "a5eb87dbf7cefb21651bf9ff0e63b5d9556d137ad7873d7d1fde934bd095b749",
}
HEADER = (
    '{"layers": {"a": {"errors": {"2": 0.05, "8": 0.0001}, "master_bits": 8, "offset": 8.0, "shape": [2, 4], '
    '"slicing": "msb"}, '
    '"b": {"errors": {"2": 0.05}, "master_bits": 4, "offset": 0.0, "shape": [1, 2], "slicing": "round"}}, "notes": []}'
)


def test_quantization_config():
    up_proj = LayerSpec(out_features=128, in_features=256, format=WeightFormat(group_size=64, zero_point_offset=8.0))
    fmt = WeightFormat(group_size=256, master_bits=6, slicing="round", has_zero_points=True, scale_dtype=torch.bfloat16)
    spec = parse_nested_config(QUANTIZATION_CONFIG)
    assert spec == NestedSpec(
        layers={
            "model.layers.0.mlp.up_proj": up_proj,
            "model.layers.0.mlp.gate_proj": up_proj,
            "model.layers.0.mlp.down_proj": LayerSpec(out_features=64, in_features=256, format=fmt),
        },
        bits=4,
        max_bits=8,
        layer_bits={"model.layers.0.mlp.up_proj": 3},
        prefill_bits=8,
        modules_to_not_convert=("lm_head",),
        plane_indices=(2, 3),
        files={"model-00001-of-00001.safetensors": FileRecord("ab" * 32, 4096)},
    )
    assert spec.to_json() == QUANTIZATION_CONFIG


def test_seal_covers_all_fields_but_the_bits():
    edited = {"bits": 2, "layer_bits": {}, "prefill_bits": None}
    assert parse_nested_config(QUANTIZATION_CONFIG | edited).bits_of("model.layers.0.mlp.up_proj") == 2
    with pytest.raises(UserError, match="does not match its seal"):
        parse_nested_config(QUANTIZATION_CONFIG | {"offset": 4.0})


def test_block_of_a_parent(tmp_path):
    tensors = {
        "a.codes": torch.tensor([[0, 127, 128, 255], [1, 2, 3, 4]], dtype=torch.uint8),
        "a.scales": torch.tensor([[1.0, -0.5], [0.0, 2.0]], dtype=torch.float16),
        "b.codes": torch.tensor([[3, 12]], dtype=torch.uint8),
        "b.scales": torch.tensor([[2.0]], dtype=torch.bfloat16),
        "b.zeros": torch.tensor([[5]], dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "block-0000.safetensors", {"matquant": HEADER})
    artifact: Any = SimpleNamespace(read_tensors=lambda name: read_tensors(tmp_path / name))
    weights, record = read_block(artifact, "block-0000.safetensors")
    assert weights["a"].format == WeightFormat(group_size=2, zero_point_offset=8.0)
    assert weights["b"].format == WeightFormat(
        group_size=2, master_bits=4, slicing="round", has_zero_points=True, scale_dtype=torch.bfloat16
    )
    assert weights["a"].dequantize(8).tolist() == [[-135.5, -8.5, 3.75, -59.75], [0.0, 0.0, -265.0, -263.0]]
    assert weights["b"].dequantize(2).tolist() == [[-2.0, 14.0]]
    assert record["layers"]["a"]["errors"] == {"2": 0.05, "8": 0.0001}
