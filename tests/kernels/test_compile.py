"""NVRTC compiles the kernels for every architecture from sm_80 on, without register spills and within instruction budgets."""

import collections
import itertools
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from matquant.formats.nested import WeightFormat
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.launch_config import make_launch_config
from matquant.inference.moe_launch import make_moe_launch
from matquant.quantize.gptq import column_solver_cuda
from tests.kernels import nvrtc
from tests.kernels.emulator import KERNELS, read_source

ARCHITECTURES = {  # multiprocessors, KiB of shared memory per multiprocessor
    "sm_80": (108, 164),
    "sm_86": (84, 100),
    "sm_89": (128, 100),
    "sm_90": (132, 228),
    "sm_90a": (132, 228),
}
MAX_INSTRUCTIONS_PER_WEIGHT = {2: 1.4, 4: 1.8}  # by bits: main loop for one token, group size 128, sm_90
ELF = b"\x7fELF"

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(
        nvrtc.library() is None,
        reason="no NVRTC: pip install nvidia-cuda-nvrtc-cu12, which the extra dev brings on x86-64 Linux",
    ),
]


def tool(name: str) -> str | None:
    """Path of a disassembler from the CUDA toolkit or from the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    wheels = [Path(folder) / "nvidia" / major / "bin" / name for folder in sys.path for major in ("cu12", "cu13")]
    return shutil.which(name) or next((str(path) for path in wheels if path.is_file()), None)


def inlined_source(name: str) -> str:
    """Kernel source with all its headers inlined."""
    device = (KERNELS / "device.cuh").read_text()
    return read_source(name).replace('#include "device.cuh"', device, 1).replace('#include "device.cuh"', "")


def compile_source(name: str, architecture: str, defines: dict[str, int], options: tuple[str, ...] = ()) -> bytes:
    macros = (f"-D{key}={value}" for key, value in defines.items())
    flags = [f"-arch={architecture}", "--std=c++17", "--ptxas-options=-v", *options, *macros]
    cubin, log = nvrtc.compile_cubin(inlined_source(name), name, flags)
    assert "serialized" not in log, (
        log
    )  # ptxas makes WGMMA synchronous where it cannot tell that registers are not read early
    return cubin


def compile_gemm(problem: GemmShape, architecture: str) -> bytes:
    """Cubin of the GEMM kernel that the launch configuration selects for the problem."""
    multiprocessors, shared = ARCHITECTURES[architecture]
    wgmma, clusters = architecture == "sm_90a", architecture.startswith("sm_90")
    device = DeviceLimits(multiprocessors=multiprocessors, shared_bytes=1024 * shared, wgmma=wgmma, clusters=clusters)
    launch = make_launch_config(problem, device)
    return compile_source(launch.source, architecture, launch.defines)


def gemm_problem(
    bits: int, tokens: int, *, rows: int = 14336, depth: int = 4096, dtype=torch.float16, **fmt: Any
) -> GemmShape:
    """GEMM shape of one layer; ``fmt`` are fields of its weight format."""
    fields = {"group_size": 128, "scale_dtype": torch.float16, "zero_point_offset": 8.0} | fmt
    return GemmShape(tokens=tokens, rows=rows, depth=depth, bits=bits, dtype=dtype, format=WeightFormat(**fields))


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of stack and local memory per thread, which hold spilled registers. Needs cuobjdump."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [str(tool("cuobjdump")), "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout)
    assert found is not None, usage.stderr
    return int(found[1]) + int(found[2])


MMA_PROBLEMS = {
    "2 bits, 1 token": gemm_problem(2, 1),
    "7 bits, 16 tokens": gemm_problem(7, 16, dtype=torch.bfloat16, has_zero_points=True),
    "4 bits, 64 tokens": gemm_problem(4, 64, slicing="round"),
    "8 bits, 16 tokens, stretched": gemm_problem(8, 16, stretch=1.25),
    "6 bits, 1 token, stretched": gemm_problem(6, 1, dtype=torch.bfloat16, stretch=1.25),
}
WGMMA_PROBLEMS = {
    "2 bits, 32 tokens": gemm_problem(2, 32),
    "8 bits, 64 tokens": gemm_problem(8, 64, dtype=torch.bfloat16, has_zero_points=True),
    "4 bits, 128 tokens, clusters": gemm_problem(4, 128, rows=4096),
    "8 bits, 256 tokens, clusters": gemm_problem(8, 256, rows=6144, dtype=torch.bfloat16, stretch=1.25),
    "2 bits, 300 tokens, deep": gemm_problem(2, 300, rows=4096, depth=14336, slicing="round"),
    "6 bits, 512 tokens, zero points": gemm_problem(6, 512, rows=4096, depth=14336, has_zero_points=True),
    "5 bits, 300 tokens": gemm_problem(5, 300, scale_dtype=torch.bfloat16),
    "8 bits, 512 tokens": gemm_problem(8, 512),
    "8 bits, 64 tokens, stretched": gemm_problem(8, 64, dtype=torch.bfloat16, stretch=1.25),
    "6 bits, 512 tokens, stretched": gemm_problem(6, 512, stretch=1.25),
    "3 bits, 1000 tokens": gemm_problem(3, 1000, dtype=torch.bfloat16, has_zero_points=True),
}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*itertools.product(ARCHITECTURES, MMA_PROBLEMS), *(("sm_90a", name) for name in WGMMA_PROBLEMS)],
)
def test_gemm_compiles_without_spills_and_serialization(architecture: str, name: str, tmp_path: Path) -> None:
    cubin = compile_gemm((MMA_PROBLEMS | WGMMA_PROBLEMS)[name], architecture)
    assert cubin[:4] == ELF
    if tool("cuobjdump") is not None:
        assert stack_bytes(cubin, tmp_path) == 0


MOE_PROBLEMS = {
    "2 bits, 8 pairs": gemm_problem(2, 8),
    "8 bits, 8 pairs, few columns": gemm_problem(8, 8, depth=768, dtype=torch.bfloat16, stretch=1.25),
    "3 bits, 16 pairs": gemm_problem(3, 16, has_zero_points=True),
    "4 bits, 32 pairs": gemm_problem(4, 32, slicing="round"),
    "4 bits, 64 pairs": gemm_problem(4, 64, dtype=torch.bfloat16),
    "5 bits, 64 pairs, groups of 32": gemm_problem(5, 64, group_size=32),
}


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90a"])
@pytest.mark.parametrize("name", MOE_PROBLEMS)
def test_experts_compile_without_spills(architecture: str, name: str, tmp_path: Path) -> None:
    multiprocessors, shared = ARCHITECTURES[architecture]
    device = DeviceLimits(multiprocessors=multiprocessors, shared_bytes=1024 * shared)
    launch = make_moe_launch(MOE_PROBLEMS[name], device)
    cubin = compile_source(launch.source, architecture, launch.defines)
    assert cubin[:4] == ELF
    if tool("cuobjdump") is not None:
        assert stack_bytes(cubin, tmp_path) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_routing_compiles(architecture: str) -> None:
    for wide, threads in ((0, 32), (1, 1024)):
        defines = {"WIDE_IDS": wide, "BLOCK_M": 8, "THREADS": threads}
        assert compile_source("moe_route.cu", architecture, defines)[:4] == ELF


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dequantize_compiles(architecture: str) -> None:
    for problem in (gemm_problem(3, 1, has_zero_points=True, dtype=torch.bfloat16), gemm_problem(7, 1, stretch=1.25)):
        assert compile_source("dequant.cu", architecture, problem.defines())[:4] == ELF


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("nested", "low"), [(0, 0), (1, 0), (1, 2)])
def test_column_solver_compiles(architecture: str, nested: int, low: int) -> None:
    defines = {"WIDTHS": 5, "TARGETS": 5, "FACTORS": 5, "NESTED": nested, "LOW": low, "STRETCH": 5, "SCALES": 2}
    source, options = column_solver_cuda.SOURCE, column_solver_cuda.OPTIONS
    assert compile_source(source, architecture, defines, options)[:4] == ELF


@pytest.mark.skipif(tool("nvdisasm") is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("bits", MAX_INSTRUCTIONS_PER_WEIGHT)
def test_instructions_per_weight(bits: int, tmp_path: Path) -> None:
    """Instructions of one main-loop iteration, including the loads of the next k-tile, per weight."""
    (tmp_path / "kernel.cubin").write_bytes(compile_gemm(gemm_problem(bits, 1), "sm_90"))
    command = [str(tool("nvdisasm")), "-c", str(tmp_path / "kernel.cubin")]
    listing = subprocess.run(command, capture_output=True, text=True)
    blocks = collections.defaultdict(list)  # basic blocks by label
    label = ""
    for line in listing.stdout.splitlines():
        if found := re.match(r"^(\.L_x_\d+):", line):
            label = found[1]
        elif re.search(r"/\*[0-9a-f]{4,5}\*/\s", line):
            blocks[label].append(line)
    multiply = max(blocks.values(), key=lambda block: sum("HMMA" in line for line in block))
    load = max(
        (block for block in blocks.values() if block is not multiply),
        key=lambda block: sum("LDGSTS" in line for line in block),
    )
    mmas = sum("HMMA" in line for line in multiply)  # 16 rows and 16 columns each: 8 weights per lane
    assert (len(multiply) + len(load)) / (8 * mmas) <= MAX_INSTRUCTIONS_PER_WEIGHT[bits]


def all_wgmma_problems() -> list[GemmShape]:
    """One problem for each WGMMA configuration that is selected for these shapes and formats."""
    multiprocessors, shared = ARCHITECTURES["sm_90a"]
    device = DeviceLimits(multiprocessors=multiprocessors, shared_bytes=1024 * shared, wgmma=True, clusters=True)
    found = {}
    for tokens, (rows, depth), bits, group_size, zeros, dtype, slicing in itertools.product(
        (24, 64, 128, 256, 300, 512),
        ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (16384, 16384)),
        (2, 4, 6, 8),
        (32, 64, 128, 192),
        (False, True),
        (torch.float16, torch.bfloat16),
        ("msb", "round"),
    ):
        problem = gemm_problem(
            bits,
            tokens,
            rows=rows,
            depth=depth,
            group_size=group_size,
            has_zero_points=zeros,
            dtype=dtype,
            scale_dtype=dtype,
            slicing=slicing,
        )
        launch = make_launch_config(problem, device)
        if launch.defines["WGMMA"]:
            found[tuple(launch.defines.items())] = problem
    return list(found.values())


def spills(problem: GemmShape) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return stack_bytes(compile_gemm(problem, "sm_90a"), Path(folder)) > 0


if __name__ == "__main__":  # the spill check in experiments/results/kernels/README.md
    problems = all_wgmma_problems()
    with multiprocessing.get_context("spawn").Pool() as pool:
        spilling = [
            problem
            for problem, spilled in zip(problems, pool.map(spills, problems, chunksize=4), strict=True)
            if spilled
        ]
    print(f"{len(spilling)} of {len(problems)} configurations spill", *spilling, sep="\n")
