"""``kernels/gemm.cu`` and ``gemm_sm90_ws.cu`` on the stand-in, against float64.

Every product has fresh random inputs whose mean is not zero and whose tails are heavy; outputs, the workspace and planes
that must not be read are poisoned. The error allowed is 1.2 times what rounding the exact result to the output makes; for
``gemm_sm90_ws.cu`` what a dense matrix makes.
"""

import dataclasses

import pytest
import torch
from tests.kernels.cases import Case, Variant, error_ratio, run
from tests.kernels.emulator import have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")

HALVES = (torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, -1)
BATCHES = {1: (1, 2, 3, 4, 5, 8), 2: (12, 13, 16), 4: (17, 31, 32), 8: (33, 48, 64)}


def check(variant: Variant, case: Case, **how: object) -> None:
    assert error_ratio(*run(variant, case, **how)) <= 1.2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int, dtype: torch.dtype) -> None:
    other = HALVES[(bits + (dtype == HALVES[0])) % 2]
    variant = Variant(bits=bits, dtype=dtype, scale_dtype=other, group=GROUPS[bits % 4])
    for seed, blocks in enumerate((1, 3)):
        check(variant, Case(tokens=5, blocks=blocks, bias=bool(seed), seed=seed))


@pytest.mark.parametrize("token_tiles", BATCHES)
def test_every_batch(token_tiles: int) -> None:
    variant = Variant(bits=3, token_tiles=token_tiles, row_warps=2, tile_warps=max(1, token_tiles // 2), panel=1)
    for tokens in BATCHES[token_tiles]:
        check(variant, Case(tokens=tokens, blocks=2, seed=tokens))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_zero_points_and_ragged_shapes(group: int, zeros: bool) -> None:
    """K is a multiple of the group, and otherwise of nothing but 8; N of nothing at all."""
    variant = Variant(bits=4, group=group, zeros=zeros, row_warps=2, units=1 + (group == 32))
    depth = 328 if group < 0 else 3 * group if group > 32 else 352
    for blocks in (1, 4):
        check(variant, Case(tokens=3, rows=131, depth=depth, blocks=blocks, bias=True, seed=blocks))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "master_bits"), [(2, 8), (4, 8), (7, 8), (3, 6), (2, 3)])
def test_rounded_slices(bits: int, master_bits: int, dtype: torch.dtype) -> None:
    variant = Variant(bits=bits, slicing="round", dtype=dtype)
    check(variant, Case(tokens=4, master_bits=master_bits, offset=0.0, seed=bits))


@pytest.mark.parametrize(("bits", "master_bits"), [(2, 2), (3, 6), (6, 6)])
def test_masters_of_fewer_bits(bits: int, master_bits: int) -> None:
    check(Variant(bits=bits, zeros=bits == 3), Case(tokens=4, master_bits=master_bits, offset=0.5))


@pytest.mark.parametrize(
    "variant",
    [
        Variant(bits=2, row_warps=4, stages=2, panel=4),
        Variant(bits=5, row_warps=2, k_warps=2, stages=4, panel=1),
        Variant(bits=3, k_warps=8, units=1, token_tiles=2, panel=1),
        Variant(bits=4, row_warps=2, tile_warps=2, k_warps=2, token_tiles=4, zeros=True, panel=1),
        Variant(bits=8, dtype=torch.bfloat16, tile_warps=4, token_tiles=2, units=1),
    ],
)
def test_work_shared_out_in_every_way(variant: Variant) -> None:
    """Blocks whose runs begin and end within tiles, cross them, or hold several; threads and blocks in three orders."""
    case = Case(tokens=8 * variant.token_tiles - 3, rows=300, depth=640)
    for seed, blocks in enumerate((1, 2, 7)):
        check(variant, dataclasses.replace(case, blocks=blocks, seed=seed), launches=2)


def test_result_does_not_depend_on_the_order_of_threads() -> None:
    variant, case = Variant(row_warps=2, k_warps=2), Case(tokens=6, rows=192, depth=1024, blocks=5)
    first = run(variant, case)[0]
    for order in range(1, 5):
        assert torch.equal(run(variant, case, order=order)[0], first)


def test_stays_inside_its_buffers() -> None:
    """Under the address sanitizer: ragged rows and columns, zero points, bias, several blocks to a tile."""
    variant = Variant(bits=3, group=32, zeros=True, row_warps=2, k_warps=2, tile_warps=2, token_tiles=2)
    check(variant, Case(tokens=13, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)


def by_wgmma(**about: object) -> Variant:
    return Variant(**({"wgmma": True, "token_tiles": 4, "row_warps": 4, "panel": 1} | about))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_wgmma_at_every_width(bits: int, dtype: torch.dtype) -> None:
    variant = by_wgmma(
        bits=bits, dtype=dtype, scale_dtype=HALVES[bits % 2], group=GROUPS[bits % 4], zeros=bits % 3 == 0
    )
    check(variant, Case(tokens=29, blocks=3, bias=True, seed=bits))


@pytest.mark.parametrize(("token_tiles", "tokens"), [(2, 13), (4, 31), (8, 33), (8, 64)])
def test_wgmma_at_every_batch(token_tiles: int, tokens: int) -> None:
    variant = by_wgmma(bits=3, token_tiles=token_tiles, row_warps=1, tile_warps=4)
    check(variant, Case(tokens=tokens, blocks=2, seed=tokens))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_wgmma_with_groups_zero_points_and_ragged_shapes(group: int, zeros: bool) -> None:
    variant = by_wgmma(group=group, zeros=zeros, row_warps=2, tile_warps=2, slicing="round" if zeros else "msb")
    depth = 328 if group < 0 else 3 * group if group > 32 else 352
    for blocks in (1, 4):
        check(variant, Case(tokens=29, rows=131, depth=depth, blocks=blocks, bias=True, offset=0.0, seed=blocks))


@pytest.mark.parametrize(
    "variant",
    [
        by_wgmma(bits=2, row_warps=2, tile_warps=2, k_warps=2, units=1, stages=4, panel=2),
        by_wgmma(bits=5, row_warps=8, units=4, stages=2),
        by_wgmma(bits=8, dtype=torch.bfloat16, row_warps=1, tile_warps=4, k_warps=2, token_tiles=2, panel=4),
        by_wgmma(bits=4, group=-1, zeros=True, row_warps=1, tile_warps=4, k_warps=4),
    ],
)
def test_wgmma_with_work_shared_out_in_every_way(variant: Variant) -> None:
    case = Case(tokens=8 * variant.token_tiles - 5, rows=300, depth=640)
    for seed, blocks in enumerate((1, 7)):
        check(variant, dataclasses.replace(case, blocks=blocks, seed=seed), launches=2)


def test_wgmma_with_scales_of_zero() -> None:
    """Sums are kept in units of a scale; one that is 0 must neither end them nor add anything that counts."""
    variant, case = by_wgmma(group=64), Case(tokens=20, rows=256, depth=512)
    check(variant, case, dead_groups=True)


def test_wgmma_stays_inside_its_buffers() -> None:
    variant = by_wgmma(bits=3, group=32, zeros=True, row_warps=2, k_warps=2, tile_warps=2, token_tiles=2)
    check(variant, Case(tokens=13, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)


def of_many(**about: object) -> Variant:
    """By ``kernels/gemm_sm90_ws.cu``: tiles of 256 rows and 128 tokens."""
    tile = {"token_tiles": 16, "row_warps": 4, "tile_warps": 2, "units": 1, "panel": 1}
    return Variant(**(tile | {"many": True, "wgmma": True} | about))


OF_256_TOKENS = {"token_tiles": 32, "row_warps": 2, "tile_warps": 4}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_many_tokens_at_every_width(bits: int, dtype: torch.dtype) -> None:
    tile = OF_256_TOKENS if bits % 2 else {}
    variant = of_many(
        bits=bits, dtype=dtype, scale_dtype=HALVES[bits // 2 % 2], group=GROUPS[bits % 4], zeros=bits % 3 == 0, **tile
    )
    check(variant, Case(tokens=90, rows=200, blocks=2, bias=True, seed=bits))


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 300), (2, 300), (3, 300), (5, 130), (7, 200)])
def test_many_tokens_in_rounds_of_whole_tiles_and_parts(blocks: int, tokens: int) -> None:
    """Two tiles of rows, of which the last is not full, and two or three of tokens: with more or fewer blocks than tiles."""
    case = Case(tokens=tokens, rows=300, depth=640, blocks=blocks, bias=True, seed=blocks)
    check(of_many(bits=3, stages=4, dtype=HALVES[blocks % 2]), case, launches=2)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_many_tokens_with_groups_zero_points_and_ragged_shapes(group: int, zeros: bool) -> None:
    variant = of_many(
        group=group,
        zeros=zeros,
        slicing="round" if zeros else "msb",
        units=2,
        token_tiles=16,
        row_warps=2,
        tile_warps=4,
    )
    depth = 328 if group < 0 else 3 * group if group > 32 else 352
    check(variant, Case(tokens=135, rows=131, depth=depth, blocks=3, bias=True, offset=0.0, seed=3))


def test_many_tokens_with_scales_of_zero() -> None:
    check(of_many(group=64), Case(tokens=70, rows=256, depth=512), dead_groups=True)


def test_many_tokens_do_not_depend_on_the_order_of_threads() -> None:
    variant, case = of_many(**OF_256_TOKENS), Case(tokens=260, rows=192, depth=1024, blocks=3)
    first = run(variant, case)[0]
    for order in (1, 2):
        assert torch.equal(run(variant, case, order=order)[0], first)


def test_many_tokens_stay_inside_their_buffers() -> None:
    variant = of_many(bits=3, group=32, zeros=True)
    check(variant, Case(tokens=130, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)
