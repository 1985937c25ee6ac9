"""Tensor files: the bytes of the safetensors library, made without copies of the tensors."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from matquant.store import Draft
from matquant.store.tensor_files import serialize_tensors

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)
SHAPES = {"scalar": (), "empty": (3, 0), "odd": (7,), "matrix": (2, 3)}


@pytest.mark.parametrize("metadata", [None, {}, {"é": 'a "quoted" value'}])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_safetensors_library(shape: str, metadata: dict[str, str] | None) -> None:
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for name in (f"b{number}", f"a{number}"):
            tensors[name] = (
                (torch.arange(64)[: torch.Size(SHAPES[shape]).numel()] + number).reshape(SHAPES[shape]).to(dtype)
            )
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    assert b"".join(serialize_tensors(tensors, metadata)) == save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata
    )


@pytest.mark.parametrize(("count", "elements"), [(1, 4_000_000), (40, 100_000)])
def test_a_file_is_written_without_a_copy_of_its_tensors(tmp_path: Path, count: int, elements: int) -> None:
    tensors = {f"{index}": torch.ones(elements, dtype=torch.float16) for index in range(count)}
    draft = Draft(tmp_path / "draft")
    draft.write_tensors("first", {"x": torch.ones(1)})  # imports
    tracemalloc.start()
    try:
        draft.write_tensors("x", tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < count * elements * 2 / 10
