"""``kernels/dequant.cu`` on the emulator: bit-identical to ``NestedWeight.dequantize``."""

import ctypes

import pytest
import torch

from matquant.formats.tile_layout import tiles
from tests.kernels.cases import GemmCase, GemmConfig, affine, make_weight, pack
from tests.kernels.emulator import compile_kernel, have_compiler, read_source

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]


def dequantize(config: GemmConfig, case: GemmCase, first_block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from 64-row block ``first_block`` on: of the kernel, and of ``NestedWeight.dequantize``."""
    weight = make_weight(config, case)
    planes, scales, zeros = pack(config, case, weight)
    rows = case.rows - first_block * 64
    out = torch.full((rows, case.depth), torch.nan).to(config.dtype)
    compile_kernel(read_source("dequant.cu"), "nested_dequantize", config.format_defines()).launch(
        (-(-tiles(rows) * tiles(case.depth) // 4),),
        (128,),
        [
            planes,
            ctypes.c_uint64(planes[0].numel() // 4),
            scales.view(torch.int16),
            zeros,
            out.view(torch.int16),
            first_block,
            rows,
            case.depth,
            tiles(case.rows),
            *affine(config, case, code_bits=case.master_bits),
        ],
        shared_bytes=4 * 64 * 144,
        seed=1,
    )
    return out, weight.dequantize(config.bits, config.dtype)[first_block * 64 :]


@pytest.mark.parametrize(
    ("config", "case", "first_block"),
    [
        (GemmConfig(bits=2), GemmCase(rows=128, depth=256), 0),
        (
            GemmConfig(bits=3, group_size=32, has_zero_points=True, dtype=torch.bfloat16),
            GemmCase(rows=100, depth=96),
            1,
        ),
        (GemmConfig(bits=5, group_size=-1, scale_dtype=torch.bfloat16), GemmCase(rows=70, depth=100), 0),
        (GemmConfig(bits=8, dtype=torch.bfloat16), GemmCase(rows=70, depth=128), 0),
        (GemmConfig(bits=4, slicing="round", group_size=64), GemmCase(rows=70, depth=192, offset=0.0), 0),
        (GemmConfig(bits=4, has_zero_points=True), GemmCase(rows=64, depth=128, master_bits=6), 0),
        (GemmConfig(bits=5, stretch=1.25), GemmCase(rows=70, depth=128), 0),
        (GemmConfig(bits=6, stretch=1.5, dtype=torch.bfloat16), GemmCase(rows=70, depth=128, master_bits=7), 1),
        (GemmConfig(bits=7, stretch=1.25, has_zero_points=True), GemmCase(rows=70, depth=128), 0),
        (GemmConfig(bits=8, stretch=1.25, dtype=torch.bfloat16), GemmCase(rows=70, depth=128), 0),
        # The last group of a row is shorter.
        (GemmConfig(bits=3, has_zero_points=True), GemmCase(rows=70, depth=200), 0),
        (GemmConfig(bits=2, dtype=torch.bfloat16), GemmCase(rows=130, depth=576), 1),
        (GemmConfig(bits=4, group_size=64), GemmCase(rows=70, depth=72), 0),
        (GemmConfig(bits=8, group_size=32), GemmCase(rows=64, depth=81), 0),
    ],
)
def test_dequantize_is_exact(config: GemmConfig, case: GemmCase, first_block: int) -> None:
    out, expected = dequantize(config, case, first_block)
    assert torch.equal(out, expected)
