"""Tile configurations of experts that the benchmark times. The kernels themselves need a GPU."""

from typing import Any

import pytest
import torch
from shared import ROOT, load_script

from matquant.inference import cuda_experts
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.moe import MoeFamily

FOLDER = ROOT / "experiments" / "benchmarks"
DEVICE = DeviceLimits(multiprocessors=132, shared_bytes=228 * 1024, wgmma=True, clusters=True)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "bench_expert_tiles.py")


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize(("bits", "depth"), [(2, 4096), (4, 768), (8, 14336)])
def test_tiles_fit_the_device_and_are_different(script: Any, tokens: int, bits: int, depth: int) -> None:
    shape = GemmShape(
        tokens=tokens, rows=2048, depth=depth, bits=bits, format=script.format_of(128, 1.25), dtype=torch.float16
    )
    tiles, family = script.moe_tiles(shape, DEVICE), MoeFamily()
    assert tiles[0] == family.choose(shape, DEVICE)
    assert len(set(tiles)) == len(tiles) > 5
    for tile in tiles:
        assert tile.ctas_per_sm * family.shared_bytes(shape, tile) <= DEVICE.shared_bytes
        assert tile.block_m == tiles[0].block_m


def test_launches_have_the_tile_inside_the_context_only(script: Any) -> None:
    shape = GemmShape(tokens=8, rows=512, depth=4096, bits=4, format=script.format_of(128, 1.25), dtype=torch.float16)
    chosen, other = script.moe_tiles(shape, DEVICE)[:2]
    before = cuda_experts.make_moe_launch
    cuda_experts.launch_cache["a plan of another tile"] = None
    with script.launches_with(other):
        inside = cuda_experts.make_moe_launch(shape, DEVICE)
        assert not cuda_experts.launch_cache
    assert cuda_experts.make_moe_launch is before
    assert (inside.defines["BLOCK_N"], inside.defines["WARPS_K"]) == (other.block_n, other.warps_k)
    assert before(shape, DEVICE).defines != inside.defines
    assert chosen != other
