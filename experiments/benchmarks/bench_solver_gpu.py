"""Time the nested solver on a GPU, on random layers of the shapes of an 8B Llama.

    make bench-solver-gpu

One decoder block: q and o 4096 x 4096, k and v 1024 x 4096, gate and up 14336 x 4096, down 4096 x 14336. q, k and v share
their input, and so do gate and up. Group size 128, five bit-widths. The time of a layer is the minimum of the repeats; the 32
blocks of the model are alike. The floor is the time of the matrix products at the rate measured in the same run.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve
from matquant.report.provenance import provenance

BLOCKS = 32
LAMBDAS = {2: 1.0, 3: 1.5, 4: 3.0, 6: 12.0, 8: 48.0}
LAYER_GROUPS = {  # layers that share their input: rows of each, and columns
    "q, k, v": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate, up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
DEFAULT = SolverOptions(lambdas=LAMBDAS, zero_point_offset=8.0, cd_passes=2)
CASES = {  # options, and number of distinct Hessians
    "solve": (SolverOptions(lambdas=LAMBDAS, scale="minmax"), 1),
    "+ scale search": (SolverOptions(lambdas=LAMBDAS), 1),
    "+ 1 coordinate-descent pass": (SolverOptions(lambdas=LAMBDAS, cd_passes=1), 1),
    "default, symmetric calibration": (DEFAULT, 1),
    "default: 4 Hessians, asymmetric": (DEFAULT, 4),
}


def make_stats(columns: int, count: int, device: torch.device) -> list[HessianStats]:
    """Hessians of correlated random inputs, ``count`` distinct ones; with several, one per bit-width and cross-Hessians too."""
    generator = torch.Generator(device).manual_seed(columns)
    distinct = []
    scale = torch.exp(0.5 * torch.randn(columns, device=device, generator=generator))
    mix = torch.randn(columns // 4, columns, device=device, generator=generator) / (columns // 4) ** 0.5
    for index in range(count):
        latent = torch.randn(2 * columns, columns // 4, device=device, generator=generator)
        inputs = (latent @ mix + 0.5 * torch.randn(2 * columns, columns, device=device, generator=generator)) * scale
        difference = 0.1 / 2**index * torch.randn(2 * columns, columns, device=device, generator=generator) * scale
        cross = 2 * difference.T @ inputs / len(inputs) if count > 1 else None
        distinct.append(HessianStats(hessian=2 * inputs.T @ inputs / len(inputs), cross_hessian=cross))
    return distinct if count == 1 else [distinct[min(k, count - 1)] for k in range(len(LAMBDAS))]


def min_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """Minimum time of the repeats, and the result."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times), result


def float32_rate(device: torch.device) -> float:
    """FLOP/s of float32 matrix products."""
    matrix = torch.randn(8192, 8192, device=device)
    return 2 * 8192**3 / min_seconds(lambda: matrix @ matrix, device, 3)[0]


def product_flop(options: SolverOptions, rows: int, columns: int, count: int) -> float:
    """FLOP of the matrix products of one layer: lazy updates of the solve, gradients and lazy updates of the passes."""
    full = 2.0 * len(LAMBDAS) * rows * columns**2
    targets = count * 2.0 * rows * columns**2 if count > 1 else 0.0
    return full / 2 + options.cd_passes * 1.5 * full + targets


def bench(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time every case on all layers of one block; seconds are those of ``BLOCKS`` blocks."""
    rate = float32_rate(device)
    found = []
    for name, (options, count) in CASES.items():
        found.append({"case": name, **_bench_case(options, count, device, repeats, rate)})
        print(_line(found[-1]), flush=True)
    return found


def _bench_case(options: SolverOptions, count: int, device: torch.device, repeats: int, rate: float) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats(device)
    factorize_seconds = solve_seconds = flop = 0.0
    errors: dict[str, dict[int, float]] = {}
    for group, (heights, columns) in LAYER_GROUPS.items():
        stats = make_stats(columns, count, device)
        prepare_hessians(stats, options)  # first-call initialization
        seconds, prepared = min_seconds(lambda s=stats: prepare_hessians(s, options), device, repeats)
        factorize_seconds += seconds
        for rows in heights:
            weight = torch.randn(rows, columns, device=device) * 0.02
            seconds, quantized = min_seconds(lambda w=weight, p=prepared: solve(w, p, options), device, repeats)
            solve_seconds += seconds
            flop += product_flop(options, rows, columns, count)
        errors[group] = {b: relative_error(weight, quantized.dequantize(b), stats[-1].hessian) for b in LAMBDAS}
        del stats, prepared, quantized
    return {
        "factorize_s": BLOCKS * factorize_seconds,
        "solve_s": BLOCKS * solve_seconds,
        "products_floor_s": BLOCKS * flop / rate,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "errors": errors,
    }


def compare_with_cpu(device: torch.device) -> dict[str, Any]:
    """Fractions of codes and scales that differ between GPU and CPU, and the relative errors of both, on one layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 2048, generator=generator) * 0.02
    gpu_stats = make_stats(2048, 4, device)
    on_cpu = {
        id(one): HessianStats(hessian=one.hessian.cpu(), cross_hessian=one.cross_hessian.cpu())
        for one in gpu_stats
        if one.cross_hessian is not None
    }
    cpu_stats = [on_cpu[id(one)] for one in gpu_stats]

    def quantize(weight: Tensor, stats: list[HessianStats]) -> NestedWeight:
        return solve(weight, prepare_hessians(stats, DEFAULT), DEFAULT).to("cpu")

    gpu, cpu = quantize(weight.to(device), gpu_stats), quantize(weight, cpu_stats)
    errors = {
        b: [relative_error(weight, one.dequantize(b), cpu_stats[-1].hessian) for one in (cpu, gpu)] for b in LAMBDAS
    }
    return {
        "codes_that_differ": (gpu.codes != cpu.codes).float().mean().item(),
        "scales_that_differ": (gpu.scales != cpu.scales).float().mean().item(),
        "relative_errors_cpu_gpu": errors,
    }


def _line(row: dict[str, Any]) -> str:
    total = row["factorize_s"] + row["solve_s"]
    return (
        f"{row['case']:<36} factorize {row['factorize_s']:6.1f} s  solve {row['solve_s']:6.1f} s  total {total:6.1f} s  "
        f"(products alone {row['products_floor_s']:5.1f} s)  peak {row['peak_gb']:.1f} GB"
    )


def main() -> None:
    """Compare one layer with the CPU, time all cases, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found; make bench-solver measures the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    agreement = compare_with_cpu(device)
    print(json.dumps(agreement))
    print(f"32 blocks of an 8B Llama (one measured), {len(LAMBDAS)} bit-widths, group size 128")
    rows = bench(device, arguments.repeats)
    if arguments.out:
        options = {
            name: dataclasses.asdict(one) | {"scale_dtype": str(one.scale_dtype)} for name, (one, _) in CASES.items()
        }
        record = {"provenance": provenance(), "compared_with_cpu": agreement, "rows": rows, "options": options}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
