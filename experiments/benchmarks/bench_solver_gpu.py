"""Times the nested solver on a GPU, on random layers of the shapes of an 8B Llama: make bench-solver-gpu

One decoder block: q and o 4096 x 4096, k and v 1024 x 4096, gate and up 14336 x 4096, down 4096 x 14336; q, k and v share
their input, as do gate and up. Group size 128, five widths. Each layer's time is the least of the repeats; the 32 blocks of
the model are alike. The floor is what the matrix products take at the rate that is measured beside them.
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

from matquant.quantize.gptq.solver import Calibration, Inputs, SolverOptions, calibrate, relative_error, solve

BLOCKS = 32
WIDTHS = {2: 1.0, 3: 1.5, 4: 3.0, 6: 12.0, 8: 48.0}
GROUPS = {  # layers that share their input: rows of each, and columns
    "q, k, v": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate, up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
VARIANTS = {
    "solve": (SolverOptions(weights=WIDTHS, scale="minmax"), 1),
    "+ scale search": (SolverOptions(weights=WIDTHS), 1),
    "+ one sweep": (SolverOptions(weights=WIDTHS, sweeps=1), 1),
    "default, symmetric calibration": (SolverOptions(weights=WIDTHS, offset=8.0, sweeps=2), 1),
    "default: four Hessians, asymmetric": (SolverOptions(weights=WIDTHS, offset=8.0, sweeps=2), 4),
}


def moments(columns: int, kinds: int, device: torch.device) -> list[Inputs]:
    """Hessians (and cross moments, when there are several) of correlated random inputs, one for each width."""
    generator = torch.Generator(device).manual_seed(columns)
    made = []
    scale = torch.exp(0.5 * torch.randn(columns, device=device, generator=generator))
    mix = torch.randn(columns // 4, columns, device=device, generator=generator) / (columns // 4) ** 0.5
    for kind in range(kinds):
        latent = torch.randn(2 * columns, columns // 4, device=device, generator=generator)
        inputs = (latent @ mix + 0.5 * torch.randn(2 * columns, columns, device=device, generator=generator)) * scale
        wrong = 0.1 / 2**kind * torch.randn(2 * columns, columns, device=device, generator=generator) * scale
        cross = 2 * wrong.T @ inputs / len(inputs) if kinds > 1 else None
        made.append(Inputs(hessian=2 * inputs.T @ inputs / len(inputs), cross=cross))
    return made if kinds == 1 else [made[min(k, kinds - 1)] for k in range(len(WIDTHS))]


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """The least of the repeats' times, and what they made."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        made = run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times), made


def rate(device: torch.device) -> float:
    """FLOP/s of float32 matrix products."""
    matrix = torch.randn(8192, 8192, device=device)
    return 2 * 8192**3 / seconds(lambda: matrix @ matrix, device, 3)[0]


def products(options: SolverOptions, rows: int, columns: int, kinds: int) -> float:
    """FLOP in matrix products of one layer: trailing updates of the solve, gradients and trailing updates of sweeps."""
    whole = 2.0 * len(WIDTHS) * rows * columns**2
    targets = kinds * 2.0 * rows * columns**2 if kinds > 1 else 0.0
    return whole / 2 + options.sweeps * 1.5 * whole + targets


def bench(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    flops = rate(device)
    found = []
    for name, (options, kinds) in VARIANTS.items():
        torch.cuda.reset_peak_memory_stats(device)
        factoring = solving = work = 0.0
        errors: dict[str, dict[int, float]] = {}
        for group, (heights, columns) in GROUPS.items():
            inputs = moments(columns, kinds, device)
            calibrate(inputs, options)  # what is set up once
            spent, calibration = seconds(lambda i=inputs, o=options: calibrate(i, o), device, repeats)
            factoring += spent
            for rows in heights:
                weight = torch.randn(rows, columns, device=device) * 0.02
                spent, made = seconds(lambda w=weight, c=calibration, o=options: solve(w, c, o), device, repeats)
                solving += spent
                work += products(options, rows, columns, kinds)
            errors[group] = {b: relative_error(weight, made.dequantize(b), inputs[-1].hessian) for b in WIDTHS}
            del inputs, calibration, made
        memory = torch.cuda.max_memory_allocated(device) / 1e9
        found.append(
            {
                "what": name,
                "factor_s": BLOCKS * factoring,
                "solve_s": BLOCKS * solving,
                "products_floor_s": BLOCKS * work / flops,
                "peak_gb": memory,
                "errors": errors,
            }
        )
        print(_line(found[-1]), flush=True)
    return found


def against_cpu(device: torch.device) -> dict[str, Any]:
    """How many codes the GPU chooses otherwise than the CPU, and the relative errors of both, on one layer."""
    options = SolverOptions(weights=WIDTHS, offset=8.0, sweeps=2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 2048, generator=generator) * 0.02
    on_gpu = moments(2048, 4, device)
    moved = {id(i): Inputs(hessian=i.hessian.cpu(), cross=i.cross.cpu()) for i in on_gpu if i.cross is not None}
    on_cpu = [moved[id(i)] for i in on_gpu]

    def solved(weight: Tensor, inputs: list[Inputs]) -> Any:
        calibration: Calibration = calibrate(inputs, options)
        return solve(weight, calibration, options).to("cpu")

    gpu, cpu = solved(weight.to(device), on_gpu), solved(weight, on_cpu)
    errors = {
        b: [relative_error(weight, made.dequantize(b), on_cpu[-1].hessian) for made in (cpu, gpu)] for b in WIDTHS
    }
    return {
        "codes_that_differ": (gpu.codes != cpu.codes).float().mean().item(),
        "scales_that_differ": (gpu.scales != cpu.scales).float().mean().item(),
        "relative_errors_cpu_gpu": errors,
    }


def _line(row: dict[str, Any]) -> str:
    both = row["factor_s"] + row["solve_s"]
    return (
        f"{row['what']:<36} factor {row['factor_s']:6.1f} s  solve {row['solve_s']:6.1f} s  together {both:6.1f} s  "
        f"(products alone {row['products_floor_s']:5.1f} s)  peak {row['peak_gb']:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and there is none; make bench-solver measures the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    about = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    agreement = against_cpu(device)
    print(json.dumps(agreement))
    print(f"32 blocks of an 8B Llama (one measured), {len(WIDTHS)} widths, group size 128")
    found = bench(device, arguments.repeats)
    if arguments.out:
        options = {
            name: dataclasses.asdict(o) | {"scale_dtype": str(o.scale_dtype)} for name, (o, _) in VARIANTS.items()
        }
        report = {"machine": about, "against_cpu": agreement, "rows": found, "options": options}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
