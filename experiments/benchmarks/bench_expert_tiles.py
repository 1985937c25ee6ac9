"""Time the grouped products of experts with other tile configurations than the chosen ones.

    python experiments/benchmarks/bench_expert_tiles.py --models mixtral --bits 4 --tokens 1,16
    python experiments/benchmarks/bench_expert_tiles.py --out outputs/expert-tiles.json

Needs a CUDA device and CuPy. A time is that of ``bench_experts.py``: a replay of a CUDA graph over several layers and routings,
divided by their number; here of one product alone, gate and up (``first``) or ``down``. Prints the fastest configurations of
each product beside the chosen one, and writes a JSON file of all.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from bench_experts import (
    GROUP_SIZE,
    LAYERS,
    MODELS,
    STRETCH,
    Layer,
    Model,
    gated,
    launches,
    random_layer,
    random_step,
    timed,
)
from kernel_timing import format_of, precompile

from matquant.formats.tile_layout import TILE
from matquant.inference import cuda_experts, cuda_ops
from matquant.inference.expert_ops import StackedExperts, route
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families.base import TileCandidate, TileConfig
from matquant.inference.kernel_families.moe import MoeFamily
from matquant.inference.moe_launch import choose_block_m, make_moe_launch
from matquant.report.provenance import provenance

MIN_WARPS, MAX_WARPS = 8, 32  # of the CTAs of a multiprocessor
SHOWN = 4


class _OneCandidate(MoeFamily):
    """Family whose only candidate is given, for its checks and its number of pipeline stages."""

    def __init__(self, candidate: TileCandidate) -> None:
        self._candidate = candidate

    def candidates(self, shape: GemmShape, device: DeviceLimits) -> Sequence[TileCandidate]:
        return [self._candidate]


def moe_tiles(shape: GemmShape, device: DeviceLimits) -> list[TileConfig]:
    """Return the chosen tile configuration, and then all others that fit the device and the shape."""
    found = [MoeFamily().choose(shape, device)]
    split = (1,) if found[0].block_m <= 16 else (1, 2, 4)
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4), split, (1, 2, 4, 8), (1, 4), (1, 2, 3, 4))
    for row_blocks, units, row_block_warps, warps_k, x_stage_tiles, ctas_per_sm in sizes:
        warps = row_blocks * row_block_warps * warps_k * ctas_per_sm
        k_tiles = -(-shape.depth // (TILE * units * warps_k))
        if not MIN_WARPS <= warps <= MAX_WARPS or k_tiles < max(2, x_stage_tiles):
            continue
        candidate = TileCandidate(
            block_m=found[0].block_m,
            block_n=TILE * row_blocks,
            block_k=TILE * units,
            row_block_warps=row_block_warps,
            warps_k=warps_k,
            x_stage_tiles=x_stage_tiles,
            ctas_per_sm=ctas_per_sm,
        )
        found += [tile for tile in [_OneCandidate(candidate).find(shape, device)] if tile is not None]
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Product:
    """One grouped product of a layer, with the inputs and routings of several steps."""

    stacks: Sequence[StackedExperts]
    rows: int
    depth: int
    inputs: Sequence[Tensor]
    routings: Sequence[Any]
    bits: Sequence[int]

    def multiply(self, seed: int) -> Tensor:
        """Outputs [pairs, rows] of one step, by one of the layers."""
        return self.stacks[seed % len(self.stacks)].linear(self.inputs[seed], self.routings[seed], self.bits)


def products(model: Model, layers: Sequence[Layer], bits: int, tokens: int) -> dict[str, Product]:
    """Both products of a layer, by name."""
    steps = [random_step(model, tokens, seed) for seed in range(launches(model, tokens, bits))]
    routings = [route(ids, range(model.experts), model.experts) for _, _, ids in steps]
    inputs, uniform = [x for x, _, _ in steps], [bits] * model.experts
    first = Product([one.first for one in layers], 2 * model.inner, model.hidden, inputs, routings, uniform)
    inner = [gated(first.multiply(seed)) for seed in range(len(steps))]
    down = Product([one.down for one in layers], model.hidden, model.inner, inner, routings, uniform)
    return {"first": first, "down": down}


def measure(name: str, bits: int, tokens: int, layers: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """Yield the time of each tile configuration of both products."""
    model, device = MODELS[name], cuda_ops.device_limits(0)
    for which, product in products(model, layers, bits, tokens).items():
        shape = GemmShape(
            tokens=choose_block_m(tokens, model.top_k, model.experts),
            rows=product.rows,
            depth=product.depth,
            bits=bits,
            format=format_of(GROUP_SIZE, STRETCH),
            dtype=torch.float16,
        )
        tiles = moe_tiles(shape, device)
        precompile([make_moe_launch(shape, device, tile) for tile in tiles])
        for tile in tiles:
            with launches_with(tile):
                us = timed(product.multiply, len(product.inputs))
            row = {"model": name, "product": which, "bits": bits, "tokens": tokens, "us": us}
            yield row | {"chosen": tile is tiles[0], "tile": dataclasses.asdict(tile)}


@contextlib.contextmanager
def launches_with(tile: TileConfig) -> Iterator[None]:
    """Context in which launches of experts have one tile configuration."""
    make = cuda_experts.make_moe_launch
    cuda_experts.launch_cache.clear()
    cuda_experts.make_moe_launch = functools.partial(make_moe_launch, tile=tile)
    try:
        yield
    finally:
        cuda_experts.make_moe_launch = make
        cuda_experts.launch_cache.clear()


def print_fastest(rows: Sequence[dict[str, Any]]) -> None:
    """Print the chosen configuration of one product and the fastest ones."""
    worked = sorted((row for row in rows if isinstance(row["us"], float)), key=lambda row: row["us"])
    for row in [*(row for row in rows if row["chosen"]), *worked[:SHOWN]]:
        tile = {key: value for key, value in row["tile"].items() if key not in ("family", "cluster", "whole_tiles")}
        mark = "chosen" if row["chosen"] else "      "
        where = f"{row['model']} {row['product']} {row['bits']} bits {row['tokens']} tokens"
        print(f"{where:36} {mark} {row['us']:>8} us {tile}", flush=True)


def main() -> None:
    """Measure and record what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-expert-tiles.json"))
    given = parser.parse_args()
    names = given.models.split(",")
    if unknown := set(names) - MODELS.keys():
        parser.error(f"--models: {', '.join(sorted(unknown))} is unknown; choose from {', '.join(MODELS)}")
    widths, batches = ([int(one) for one in text.split(",")] for text in (given.bits, given.tokens))
    rows: list[dict[str, Any]] = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        layers = [random_layer(MODELS[name]) for _ in range(LAYERS)]
        for bits, tokens in itertools.product(widths, batches):
            found = list(measure(name, bits, tokens, layers))
            for which in ("first", "down"):
                print_fastest([row for row in found if row["product"] == which])
            rows += found
            given.out.write_text(json.dumps({"provenance": provenance(), "timings": rows}, indent=1) + "\n")
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
