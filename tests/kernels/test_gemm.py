"""``kernels/gemm.cu`` and ``kernels/gemm_sm90_ws.cu`` on the emulator, against float64.

Inputs are random with a nonzero mean and outliers. Outputs, the workspace, and planes that must not be read are poisoned.
The error may be 1.2 times that of rounding the exact result to the output dtype; for ``gemm_sm90_ws.cu``, 1.2 times that
of a dense matrix.
"""

import dataclasses

import pytest
import torch

from tests.kernels.cases import GemmCase, GemmConfig, run
from tests.kernels.emulator import have_compiler

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]

HALVES = (torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128, -1)
TOKENS = {8: (1, 2, 3, 4, 5, 8), 16: (12, 13, 16), 32: (17, 31, 32), 64: (33, 48, 64)}  # by block_m
BLOCK_M_256 = {"block_m": 256, "block_n": 128, "row_block_warps": 4}  # tiles of wgmma_ws


def wgmma_config(**fields: object) -> GemmConfig:
    return GemmConfig(**({"family": "wgmma", "block_m": 32, "block_n": 256, "x_stage_tiles": 1} | fields))


def ws_config(**fields: object) -> GemmConfig:
    """Configuration of ``gemm_sm90_ws.cu``, by default with tiles of 256 rows and 128 tokens."""
    tile = {"block_m": 128, "block_n": 256, "row_block_warps": 2, "block_k": 64, "x_stage_tiles": 1}
    return GemmConfig(**(tile | {"family": "wgmma_ws"} | fields))


def check(config: GemmConfig, case: GemmCase, **options: object) -> None:
    assert run(config, case, **options).error_ratio() <= 1.2


SHORT_LAST_GROUPS = [(72, 32), (72, 64), (200, 32), (200, 64), (200, 128), (576, 128), (576, 256)]  # K, group size


def ragged_depth(group_size: int) -> int:
    """K that is a multiple of the group size, and otherwise only of 8."""
    if group_size < 0:
        return 328
    return 3 * group_size if group_size > 32 else 352


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width(bits: int, dtype: torch.dtype) -> None:
    other = HALVES[(bits + (dtype == HALVES[0])) % 2]
    config = GemmConfig(bits=bits, dtype=dtype, scale_dtype=other, group_size=GROUP_SIZES[bits % 4])
    for seed, blocks in enumerate((1, 3)):
        check(config, GemmCase(tokens=5, blocks=blocks, bias=bool(seed), seed=seed))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "stretch"), [(5, 1.25), (6, 1.25), (7, 1.25), (8, 1.25), (6, 1.5), (8, 1.5)])
def test_stretched_planes(bits: int, stretch: float, dtype: torch.dtype) -> None:
    config = GemmConfig(
        bits=bits, stretch=stretch, dtype=dtype, group_size=GROUP_SIZES[bits % 4], has_zero_points=stretch == 1.5
    )
    for seed, case in enumerate((GemmCase(tokens=5, blocks=3), GemmCase(tokens=1, master_bits=bits, offset=2.0))):
        check(config, dataclasses.replace(case, seed=seed, bias=True))
    split = dataclasses.replace(config, row_block_warps=2, block_n=128, block_m=32, x_stage_tiles=1)
    check(split, GemmCase(tokens=29, rows=131, depth=352, blocks=2))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "stretch"), [(5, 1.5), (6, 1.25), (7, 1.25), (8, 1.25), (8, 1.5)])
def test_wgmma_stretched_planes(bits: int, stretch: float, dtype: torch.dtype) -> None:
    fields = {"bits": bits, "stretch": stretch, "dtype": dtype, "has_zero_points": stretch == 1.5}
    check(wgmma_config(**fields), GemmCase(tokens=29, blocks=3, bias=True, seed=bits))
    check(ws_config(**fields), GemmCase(tokens=90, rows=200, blocks=2, seed=bits))


@pytest.mark.parametrize("block_m", TOKENS)
def test_every_number_of_tokens(block_m: int) -> None:
    config = GemmConfig(bits=3, block_m=block_m, block_n=128, row_block_warps=max(1, block_m // 16), x_stage_tiles=1)
    for tokens in TOKENS[block_m]:
        check(config, GemmCase(tokens=tokens, blocks=2, seed=tokens))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_group_sizes_zero_points_and_ragged_shapes(group_size: int, zeros: bool) -> None:
    config = GemmConfig(
        bits=4, group_size=group_size, has_zero_points=zeros, block_n=128, block_k=128 if group_size == 32 else 64
    )
    for blocks in (1, 4):
        case = GemmCase(tokens=3, rows=131, depth=ragged_depth(group_size), blocks=blocks, bias=True, seed=blocks)
        check(config, case)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("depth", "group_size"), SHORT_LAST_GROUPS)
def test_short_last_group(depth: int, group_size: int, zeros: bool) -> None:
    for warps_k, block_k in ((1, 128), (2, 64)):
        config = GemmConfig(bits=3, group_size=group_size, has_zero_points=zeros, warps_k=warps_k, block_k=block_k)
        check(config, GemmCase(tokens=5, rows=131, depth=depth, blocks=3, bias=True, seed=depth))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "master_bits"), [(2, 8), (4, 8), (7, 8), (3, 6), (2, 3)])
def test_round_slicing(bits: int, master_bits: int, dtype: torch.dtype) -> None:
    config = GemmConfig(bits=bits, slicing="round", dtype=dtype)
    check(config, GemmCase(tokens=4, master_bits=master_bits, offset=0.0, seed=bits))


@pytest.mark.parametrize(("bits", "master_bits"), [(2, 2), (3, 6), (6, 6)])
def test_fewer_master_bits(bits: int, master_bits: int) -> None:
    config = GemmConfig(bits=bits, has_zero_points=bits == 3)
    check(config, GemmCase(tokens=4, master_bits=master_bits, offset=0.5))


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(bits=2, block_n=256, stages=2, x_stage_tiles=4),
        GemmConfig(bits=5, block_n=128, warps_k=2, stages=4, x_stage_tiles=1),
        GemmConfig(bits=3, warps_k=8, block_k=64, block_m=16, x_stage_tiles=1),
        GemmConfig(
            bits=4, block_n=128, row_block_warps=2, warps_k=2, block_m=32, has_zero_points=True, x_stage_tiles=1
        ),
        GemmConfig(bits=8, dtype=torch.bfloat16, row_block_warps=4, block_m=16, block_k=64),
    ],
)
def test_stream_k_ranges(config: GemmConfig) -> None:
    """Ranges start and end within tiles, cross them, or hold several; three schedules of threads and blocks."""
    case = GemmCase(tokens=config.block_m - 3, rows=300, depth=640)
    for seed, blocks in enumerate((1, 2, 7)):
        check(config, dataclasses.replace(case, blocks=blocks, seed=seed), launches=2)


def test_result_is_independent_of_the_schedule() -> None:
    config, case = GemmConfig(block_n=128, warps_k=2), GemmCase(tokens=6, rows=192, depth=1024, blocks=5)
    first = run(config, case).y
    for order in range(1, 5):
        assert torch.equal(run(config, case, order=order).y, first)


def test_no_access_outside_buffers() -> None:
    """Address sanitizer: ragged rows and columns, zero points, bias, several blocks per tile."""
    config = GemmConfig(
        bits=3, group_size=32, has_zero_points=True, block_n=128, warps_k=2, row_block_warps=2, block_m=16
    )
    check(config, GemmCase(tokens=13, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_clusters_every_bit_width(bits: int, dtype: torch.dtype) -> None:
    """Several clusters, of which the last one has ragged rows; blocks with several k-tiles, with one, and with none."""
    config = GemmConfig(
        bits=bits,
        dtype=dtype,
        scale_dtype=HALVES[bits % 2],
        group_size=GROUP_SIZES[bits % 4],
        has_zero_points=bits % 3 == 0,
        stretch=1.25,
        warps_k=(1, 2, 4)[bits % 3],
        block_k=64,
        cluster=(2, 4, 8)[bits % 3],
    )
    for seed, depth in enumerate((352, 1344)):
        check(config, GemmCase(tokens=5, rows=131, depth=depth, bias=True, seed=seed))


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(bits=2, cluster=2, block_n=256, stages=2, x_stage_tiles=4),
        GemmConfig(bits=5, cluster=3, block_n=128, warps_k=2, row_block_warps=2, block_m=32, x_stage_tiles=1),
        GemmConfig(bits=4, cluster=8, warps_k=8, block_k=64, block_m=16, x_stage_tiles=1),
    ],
)
def test_clusters_are_independent_of_the_schedule(config: GemmConfig) -> None:
    case = GemmCase(tokens=config.block_m - 3, rows=300, depth=1344)
    check(config, case, launches=2)
    first = run(config, case).y
    for order in range(1, 4):
        assert torch.equal(run(config, case, order=order).y, first)


def test_clusters_without_access_outside_buffers() -> None:
    config = GemmConfig(bits=3, group_size=32, has_zero_points=True, warps_k=2, block_n=128, cluster=4, block_m=16)
    check(config, GemmCase(tokens=13, rows=131, depth=352, bias=True, seed=1), sanitize=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_wgmma_every_bit_width(bits: int, dtype: torch.dtype) -> None:
    config = wgmma_config(
        bits=bits,
        dtype=dtype,
        scale_dtype=HALVES[bits % 2],
        group_size=GROUP_SIZES[bits % 4],
        has_zero_points=bits % 3 == 0,
    )
    check(config, GemmCase(tokens=29, blocks=3, bias=True, seed=bits))


@pytest.mark.parametrize(("block_m", "tokens"), [(16, 13), (32, 31), (64, 33), (64, 64)])
def test_wgmma_every_number_of_tokens(block_m: int, tokens: int) -> None:
    config = wgmma_config(bits=3, block_m=block_m, block_n=64, row_block_warps=4)
    check(config, GemmCase(tokens=tokens, blocks=2, seed=tokens))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_wgmma_group_sizes_zero_points_and_ragged_shapes(group_size: int, zeros: bool) -> None:
    config = wgmma_config(
        group_size=group_size,
        has_zero_points=zeros,
        block_n=128,
        row_block_warps=2,
        slicing="round" if zeros else "msb",
    )
    case = GemmCase(tokens=29, rows=131, depth=ragged_depth(group_size), bias=True, offset=0.0)
    for blocks in (1, 4):
        check(config, dataclasses.replace(case, blocks=blocks, seed=blocks))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("depth", "group_size"), SHORT_LAST_GROUPS)
def test_wgmma_short_last_group(depth: int, group_size: int, zeros: bool) -> None:
    config = wgmma_config(bits=3, group_size=group_size, has_zero_points=zeros)
    check(config, GemmCase(tokens=29, rows=131, depth=depth, blocks=3, bias=True, seed=depth))


@pytest.mark.parametrize(
    "config",
    [
        wgmma_config(bits=2, block_n=128, row_block_warps=2, warps_k=2, block_k=64, stages=4, x_stage_tiles=2),
        wgmma_config(bits=5, block_n=512, block_k=256, stages=2),
        wgmma_config(
            bits=8, dtype=torch.bfloat16, block_n=64, row_block_warps=4, warps_k=2, block_m=16, x_stage_tiles=4
        ),
        wgmma_config(bits=4, group_size=-1, has_zero_points=True, block_n=64, row_block_warps=4, warps_k=4),
    ],
)
def test_wgmma_stream_k_ranges(config: GemmConfig) -> None:
    case = GemmCase(tokens=config.block_m - 5, rows=300, depth=640)
    for seed, blocks in enumerate((1, 7)):
        check(config, dataclasses.replace(case, blocks=blocks, seed=seed), launches=2)


def test_wgmma_scales_of_zero() -> None:
    """The accumulators are in units of a scale; a scale of 0 must neither make them infinite nor contribute."""
    check(wgmma_config(group_size=64), GemmCase(tokens=20, rows=256, depth=512), zero_scales=True)


def test_wgmma_no_access_outside_buffers() -> None:
    config = wgmma_config(
        bits=3, group_size=32, has_zero_points=True, block_n=128, warps_k=2, row_block_warps=2, block_m=16
    )
    check(config, GemmCase(tokens=13, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_ws_every_bit_width(bits: int, dtype: torch.dtype) -> None:
    config = ws_config(
        bits=bits,
        dtype=dtype,
        scale_dtype=HALVES[bits // 2 % 2],
        group_size=GROUP_SIZES[bits % 4],
        has_zero_points=bits % 3 == 0,
        **(BLOCK_M_256 if bits % 2 else {}),
    )
    check(config, GemmCase(tokens=90, rows=200, blocks=2, bias=True, seed=bits))


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 300), (2, 300), (3, 300), (5, 130), (7, 200)])
def test_ws_waves_and_stream_k(blocks: int, tokens: int) -> None:
    """Two row tiles, the second one partial, and two or three token tiles, with more or fewer blocks than tiles."""
    case = GemmCase(tokens=tokens, rows=300, depth=640, blocks=blocks, bias=True, seed=blocks)
    check(ws_config(bits=3, stages=4, dtype=HALVES[blocks % 2]), case, launches=2)


@pytest.mark.parametrize(("blocks", "tokens"), [(2, 130), (4, 300), (5, 300), (6, 200)])
def test_ws_whole_tiles(blocks: int, tokens: int) -> None:
    """Waves of four or six tiles: full ones, a last one with fewer tiles than blocks, and one with more blocks than tiles."""
    config = ws_config(bits=3, whole_tiles=True, dtype=HALVES[blocks % 2])
    check(config, GemmCase(tokens=tokens, rows=300, depth=352, blocks=blocks, bias=True, seed=blocks), launches=2)


WS_CLUSTERS = {
    "128 tokens": ws_config(bits=3, block_n=192, row_block_warps=4, cluster=5, has_zero_points=True),
    "256 tokens, 2 blocks": ws_config(bits=8, stretch=1.25, **BLOCK_M_256, cluster=2),
    "two row tiles in a warp": ws_config(bits=4, cluster=3, dtype=torch.bfloat16),
    "sixteen warps": ws_config(bits=2, block_m=32, block_n=256, row_block_warps=4, cluster=4, has_zero_points=True),
}


@pytest.mark.parametrize("name", WS_CLUSTERS)
def test_ws_clusters(name: str) -> None:
    """Several k-tiles for a block, one, and none; ragged rows and tokens, in two token tiles."""
    config = WS_CLUSTERS[name]
    for depth in (1344, 640, 128):
        case = GemmCase(tokens=config.block_m + 13, rows=200, depth=depth, bias=True, seed=depth)
        check(config, case, launches=2)


def test_ws_clusters_are_independent_of_the_schedule() -> None:
    config, case = WS_CLUSTERS["sixteen warps"], GemmCase(tokens=30, rows=300, depth=1344)
    first = run(config, case).y
    for order in (1, 2, 3):
        assert torch.equal(run(config, case, order=order).y, first)


def test_ws_clusters_without_access_outside_buffers() -> None:
    config = ws_config(bits=3, group_size=32, has_zero_points=True, cluster=2)
    check(config, GemmCase(tokens=130, rows=131, depth=352, bias=True, seed=1), sanitize=True)


@pytest.mark.parametrize("config", [wgmma_config(bits=3), wgmma_config(bits=3, cluster=2), ws_config(bits=3)])
@pytest.mark.parametrize("rows", [132, 130, 131])
def test_rows_of_y_at_any_alignment(rows: int, config: GemmConfig) -> None:
    """Four rows of W are stored at once where every row of y is aligned to them, else one."""
    check(config, GemmCase(tokens=29, rows=rows, depth=352, blocks=3, bias=True, seed=rows), sanitize=True)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_ws_group_sizes_zero_points_and_ragged_shapes(group_size: int, zeros: bool) -> None:
    config = ws_config(
        group_size=group_size,
        has_zero_points=zeros,
        slicing="round" if zeros else "msb",
        block_k=128,
        block_n=128,
        row_block_warps=4,
    )
    depth = ragged_depth(group_size)
    check(config, GemmCase(tokens=135, rows=131, depth=depth, blocks=3, bias=True, offset=0.0, seed=3))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("depth", "group_size"), SHORT_LAST_GROUPS)
def test_ws_short_last_group(depth: int, group_size: int, zeros: bool) -> None:
    config = ws_config(
        bits=3, group_size=group_size, has_zero_points=zeros, block_k=128, block_n=128, row_block_warps=4
    )
    check(config, GemmCase(tokens=135, rows=131, depth=depth, blocks=3, bias=True, seed=depth))


def test_ws_scales_of_zero() -> None:
    check(ws_config(group_size=64), GemmCase(tokens=70, rows=256, depth=512), zero_scales=True)


def test_ws_result_is_independent_of_the_schedule() -> None:
    config, case = ws_config(**BLOCK_M_256), GemmCase(tokens=260, rows=192, depth=1024, blocks=3)
    first = run(config, case).y
    for order in (1, 2):
        assert torch.equal(run(config, case, order=order).y, first)


def test_ws_no_access_outside_buffers() -> None:
    config = ws_config(bits=3, group_size=32, has_zero_points=True)
    check(config, GemmCase(tokens=130, rows=131, depth=352, blocks=3, bias=True, seed=1), sanitize=True)


PARTS = [
    GemmConfig(bits=3, group_size=32, has_zero_points=True),
    GemmConfig(bits=8, group_size=64, stretch=1.25, block_n=128),
    GemmConfig(bits=4, group_size=-1),
    GemmConfig(bits=2, cluster=2, warps_k=2),
    wgmma_config(bits=5, has_zero_points=True),
    wgmma_config(bits=8, group_size=-1),
    ws_config(bits=2, group_size=32),
    ws_config(bits=6, has_zero_points=True),
    ws_config(bits=3, cluster=2),
]


@pytest.mark.parametrize("config", PARTS)
def test_part_of_a_larger_weight(config: GemmConfig) -> None:
    """Row tiles before and after the part are not read; the last tile of the part is ragged."""
    tokens = {"mma": 5, "wgmma": 31, "wgmma_ws": 130}[config.family]
    for before, after in ((3, 0), (1, 4)):
        case = GemmCase(tokens=tokens, rows=200, depth=352, blocks=2, bias=True, before=before, after=after)
        check(config, case)
