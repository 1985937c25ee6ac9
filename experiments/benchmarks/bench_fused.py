"""Time layers that share an input: one launch for all of them, a launch for each, and one dense float16 layer.

    python experiments/benchmarks/bench_fused.py
    python experiments/benchmarks/bench_fused.py --groups 4096+1024+1024x4096 --bits 2 --tokens 1,16

Needs a CUDA device and CuPy. First every group is compared with float64 at mixed bit-widths, where each layer is a range of row
tiles of the whole. Each time is a replay of a CUDA graph over copies of the weights that exceed the second-level cache.
Separate launches include the concatenation of their outputs. Writes a JSON file.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_checks import activations
from kernel_timing import format_of, replay
from torch import Tensor

from matquant.formats.nested import NestedWeight
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import TILE, plane_shape, tiles
from matquant.inference import ops
from matquant.report.provenance import provenance

GROUPS = "4096+1024+1024x4096,14336+14336x4096,576+192+192x576,1536+1536x576"  # of Llama 3 8B and SmolLM2 135M
GROUP_SIZE = 64


def random_planes(rows: int, columns: int) -> NestedPlanes:
    """Weight of random codes on the GPU."""
    scales = torch.rand(columns // GROUP_SIZE, tiles(rows), 8, 4, 2, device="cuda") * 0.02
    return NestedPlanes(
        planes=torch.randint(-(2**31), 2**31 - 1, (8, *plane_shape(rows, columns)), dtype=torch.int32, device="cuda"),
        scales=scales.half(),
        zeros=None,
        out_features=rows,
        in_features=columns,
        format=format_of(GROUP_SIZE, 1.25),
    )


def parts_of(whole: NestedPlanes, rows: Sequence[int]) -> list[NestedPlanes]:
    """Layers of so many rows as ranges of row tiles of the whole; they copy nothing."""
    ends = list(itertools.accumulate(tiles(count) for count in rows))
    ranges = [slice(end - tiles(count), end) for end, count in zip(ends, rows, strict=True)]
    return [
        NestedPlanes(
            planes=whole.planes[:, one],
            scales=whole.scales[:, one],
            zeros=None,
            out_features=count,
            in_features=whole.in_features,
            format=whole.format,
        )
        for one, count in zip(ranges, rows, strict=True)
    ]


def worst_error(rows: Sequence[int], columns: int) -> float:
    """Largest error of the parts at different bit-widths, as a multiple of that of rounding the exact result."""
    weights = [
        NestedWeight(
            codes=torch.randint(0, 256, (count, columns), dtype=torch.uint8, device="cuda"),
            scales=(torch.rand(count, columns // GROUP_SIZE, device="cuda") * 0.02 + 0.001).half(),
            zeros=None,
            format=format_of(GROUP_SIZE, 1.25),
        )
        for count in rows
    ]
    packed = [NestedPlanes.pack(weight) for weight in weights]
    whole = NestedPlanes(
        planes=torch.cat([one.planes for one in packed], 1),
        scales=torch.cat([one.scales for one in packed], 1),
        zeros=None,
        out_features=sum(rows),
        in_features=columns,
        format=packed[0].format,
    )
    worst = 0.0
    for tokens, (weight, part, bits) in itertools.product(
        (1, 12, 40, 130, 1500), zip(weights, parts_of(whole, rows), (2, 4, 8), strict=False)
    ):
        x = activations(tokens, columns, torch.float16)
        dense = weight.dequantize(bits, torch.float16 if tokens > TILE else torch.float32)
        exact = x.double() @ weight.dequantize(bits).double().T
        best = (x.double() @ dense.double().T).half() if tokens > TILE else exact.half()
        error = torch.linalg.norm(ops.linear(x, part, bits).double() - exact)
        worst = max(worst, (error / torch.linalg.norm(best.double() - exact)).item())
    return worst


def separately(x: Tensor, parts: Sequence[NestedPlanes], bits: int) -> Tensor:
    """Product of each layer, concatenated."""
    return torch.cat([ops.linear(x, part, bits) for part in parts], -1)


def measure(rows: Sequence[int], columns: int, bits: int, tokens: int) -> dict[str, Any]:
    """Times in microseconds."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    x, total = activations(tokens, columns, torch.float16), sum(rows)
    copies = max(3, -(-4 * cache // (total * columns * bits // 8)))
    wholes = [random_planes(total, columns) for _ in range(min(copies, 24))]
    separate = [[random_planes(count, columns) for count in rows] for _ in wholes]
    dense = [torch.randn(total, columns, device="cuda").half() for _ in range(min(24, max(3, copies * bits // 16)))]
    launches: dict[str, list[Callable[[], Any]]] = {
        "fused_us": [functools.partial(ops.linear, x, one, bits) for one in wholes],
        "separate_us": [functools.partial(separately, x, one, bits) for one in separate],
        "fp16_us": [functools.partial(torch.nn.functional.linear, x, one) for one in dense],
    }
    return {name: round(replay(one), 2) for name, one in launches.items()}


def main() -> None:
    """Check, measure and record what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=GROUPS, help="out features of each layer x in features")
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--tokens", default="1,16,64,256")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-fused.json"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    errors = {}
    for group in given.groups.split(","):
        members, columns = group.split("x")
        sizes = [int(count) for count in members.split("+")]
        errors[group] = worst_error(sizes, int(columns))
        print(f"{group}: the largest error is {errors[group]:.4f} times that of rounding", flush=True)
        if not errors[group] <= 1.2:
            raise SystemExit("WRONG")
        for bits, tokens in itertools.product(map(int, given.bits.split(",")), map(int, given.tokens.split(","))):
            found = measure(sizes, int(columns), bits, tokens)
            rows.append({"group": group, "bits": bits, "tokens": tokens, **found})
            print(json.dumps(rows[-1]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "largest_errors": errors, "timings": rows}
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
