"""Marks and helpers of the tests on a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None, reason="no NVIDIA GPU, or no CuPy"
    ),
]
TINY = Path(__file__).parent.parent.parent / "experiments" / "models" / "tiny"


def activations(*shape, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) + 0.3).to("cuda", dtype)


def times_rounding(made, exact, dtype):
    return ((made.double() - exact).norm() / (exact.to(dtype).double() - exact).norm()).item()
