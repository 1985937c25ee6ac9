"""``kernels/dequant.cu`` on the stand-in: bit for bit what the format's own ``decode`` gives."""

import ctypes

import pytest
import torch
from tests.kernels.cases import Case, Variant, make_weight
from tests.kernels.emulator import compile_kernel, have_compiler, read_source

from matquant.formats.nested import planes_read
from matquant.formats.tile_layout import pack_groups, pack_planes, tiles

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")


def decoded(variant: Variant, case: Case, first_block: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(the kernel's rows from ``first_block`` on, the same rows of ``NestedWeight.dequantize``)."""
    weight = make_weight(variant, case)
    up = 8 - case.master_bits
    padded = torch.zeros(tiles(case.rows) * 64, tiles(case.depth) * 64, dtype=torch.uint8)
    padded[: case.rows, : case.depth] = weight.codes << up
    planes = pack_planes(padded, 8)
    planes[planes_read(variant.bits, case.master_bits, variant.slicing) :] = -1
    groups = -(-tiles(case.depth) * 64 // variant.group) if variant.group > 0 else 1
    rows = case.rows - first_block * 64
    out = torch.full((rows, case.depth), torch.nan).to(variant.dtype)
    step, centre = 2.0 ** (case.master_bits - variant.bits), 0.5 if variant.slicing == "msb" else 0.0
    zero = 0.0 if variant.zeros else 2.0 ** (case.master_bits - 1) + case.offset
    names = ("BITS", "ROUND", "GROUP", "ZEROS", "BFLOAT", "SCALE_BFLOAT")
    defines = {name: variant.defines()[name] for name in names}
    compile_kernel(read_source("dequant.cu"), "nested_dequantize", defines).launch(
        (-(-tiles(rows) * tiles(case.depth) // 4),),
        (128,),
        [
            planes,
            ctypes.c_uint64(planes[0].numel() // 4),
            pack_groups(weight.scales, groups).view(torch.int16),
            None if weight.zeros is None else pack_groups(weight.zeros, groups),
            out.view(torch.int16),
            first_block,
            rows,
            case.depth,
            tiles(case.rows),
            centre - zero / step,
            1 / step,
            step,
        ],
        shared_bytes=4 * 64 * 144,
        seed=1,
    )
    return out, weight.dequantize(variant.bits, variant.dtype)[first_block * 64 :]


@pytest.mark.parametrize(
    ("variant", "case", "first_block"),
    [
        (Variant(bits=2), Case(rows=128, depth=256), 0),
        (Variant(bits=3, group=32, zeros=True, dtype=torch.bfloat16), Case(rows=100, depth=96), 1),
        (Variant(bits=5, group=-1, scale_dtype=torch.bfloat16), Case(rows=70, depth=100), 0),
        (Variant(bits=8, dtype=torch.bfloat16), Case(rows=70, depth=128), 0),
        (Variant(bits=4, slicing="round", group=64), Case(rows=70, depth=192, offset=0.0), 0),
        (Variant(bits=4, zeros=True), Case(rows=64, depth=128, master_bits=6), 0),
    ],
)
def test_decode_is_exact(variant: Variant, case: Case, first_block: int) -> None:
    out, expected = decoded(variant, case, first_block)
    assert torch.equal(out, expected)
