"""The kernels compile for every architecture from sm_80 on, without spilled registers and within their instructions."""

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

import nvrtc
import pytest
import torch
from standin import KERNELS, read_source

from matquant.formats.nested import WeightFormat
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.launch_config import make_launch_config
from matquant.quantize.gptq import column_solver_cuda

ARCHITECTURES = {
    "sm_80": (108, 164),
    "sm_86": (84, 100),
    "sm_89": (128, 100),
    "sm_90": (132, 228),
    "sm_90a": (132, 228),
}
INSTRUCTIONS_PER_WEIGHT = {2: 1.4, 4: 1.8}  # of the main loop, one token, groups of 128, sm_90

pytestmark = pytest.mark.skipif(
    nvrtc.library() is None,
    reason="no NVRTC: pip install nvidia-cuda-nvrtc-cu12, which the extra dev brings on x86-64 Linux",
)


def tool(name: str) -> str | None:
    """A disassembler of the CUDA toolkit or of the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    wheels = [Path(folder) / "nvidia" / major / "bin" / name for folder in sys.path for major in ("cu12", "cu13")]
    return shutil.which(name) or next((str(path) for path in wheels if path.is_file()), None)


def source(name: str) -> str:
    device = (KERNELS / "device.cuh").read_text()
    return read_source(name).replace('#include "device.cuh"', device, 1).replace('#include "device.cuh"', "")


def cubin(problem: GemmShape, architecture: str, name: str = "") -> bytes:
    """Of the matmul that is chosen, or of another kernel for the problem."""
    multiprocessors, shared = ARCHITECTURES[architecture]
    wgmma = architecture == "sm_90a"
    made = make_launch_config(problem, DeviceLimits(multiprocessors=multiprocessors, shared_bytes=1024 * shared, wgmma=wgmma))
    defines = problem.defines() if name else made.defines
    options = [f"-arch={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    return nvrtc.compile_cubin(source(name or made.source), name or made.source, options)


def problem(
    bits: int, tokens: int, *, rows: int = 14336, depth: int = 4096, dtype=torch.float16, **fmt: Any
) -> GemmShape:
    """GEMM shape of one layer; ``fmt`` are fields of its weight format."""
    about = {"group_size": 128, "scale_dtype": torch.float16, "zero_point_offset": 8.0} | fmt
    return GemmShape(tokens=tokens, rows=rows, depth=depth, bits=bits, dtype=dtype, format=WeightFormat(**about))


def stack_bytes(compiled: bytes, folder: Path) -> int:
    """What each thread of a kernel keeps in memory: registers that it has no room for. Needs cuobjdump."""
    (folder / "kernel.cubin").write_bytes(compiled)
    command = [str(tool("cuobjdump")), "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout)
    assert found is not None, usage.stderr
    return int(found[1]) + int(found[2])


CASES = {
    "2 bits, 1 token": problem(2, 1),
    "7 bits, 16 tokens": problem(7, 16, dtype=torch.bfloat16, has_zero_points=True),
    "4 bits, 64 tokens": problem(4, 64, slicing="round"),
}
MANY = {  # by wgmma
    "2 bits, 32 tokens": problem(2, 32),
    "8 bits, 64 tokens": problem(8, 64, dtype=torch.bfloat16, has_zero_points=True),
    "5 bits, 300 tokens": problem(5, 300, scale_dtype=torch.bfloat16),
    "8 bits, 512 tokens": problem(8, 512),
    "3 bits, 1000 tokens": problem(3, 1000, dtype=torch.bfloat16, has_zero_points=True),
}


@pytest.mark.parametrize(
    ("architecture", "case"), [*itertools.product(ARCHITECTURES, CASES), *(("sm_90a", case) for case in MANY)]
)
def test_compiles_without_spilling(architecture: str, case: str, tmp_path: Path) -> None:
    compiled = cubin((CASES | MANY)[case], architecture)
    assert compiled[:4] == b"\x7fELF"
    if tool("cuobjdump") is not None:
        assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_compiles(architecture: str) -> None:
    assert (
        cubin(problem(3, 1, has_zero_points=True, dtype=torch.bfloat16), architecture, "dequant.cu")[:4] == b"\x7fELF"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("nested", [0, 1])
def test_the_solver_compiles(architecture: str, nested: int) -> None:
    defines = {"WIDTHS": 5, "TARGETS": 5, "FACTORS": 5, "NESTED": nested, "SCALES": 2}
    options = [
        f"-arch={architecture}",
        "--std=c++17",
        *column_solver_cuda.OPTIONS,
        *(f"-D{k}={v}" for k, v in defines.items()),
    ]
    assert nvrtc.compile_cubin(source(column_solver_cuda.SOURCE), column_solver_cuda.SOURCE, options)[:4] == b"\x7fELF"


@pytest.mark.skipif(tool("nvdisasm") is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("bits", INSTRUCTIONS_PER_WEIGHT)
def test_instructions_per_weight(bits: int, tmp_path: Path) -> None:
    """All instructions of the loop over chunks that every chunk executes, those that copy the next chunk with them."""
    made = problem(bits, 1)
    (tmp_path / "kernel.cubin").write_bytes(cubin(made, "sm_90"))
    listing = subprocess.run(
        [str(tool("nvdisasm")), "-c", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    blocks = collections.defaultdict(list)
    label = ""
    for line in listing.stdout.splitlines():
        if found := re.match(r"^(\.L_x_\d+):", line):
            label = found[1]
        elif re.search(r"/\*[0-9a-f]{4,5}\*/\s", line):
            blocks[label].append(line)
    main = max(blocks.values(), key=lambda block: sum("HMMA" in line for line in block))
    copying = max(
        (b for b in blocks.values() if b is not main), key=lambda block: sum("LDGSTS" in line for line in block)
    )
    multiplications = sum("HMMA" in line for line in main)  # of 16 rows and 16 columns: 8 weights of a lane
    assert (len(main) + len(copying)) / (8 * multiplications) <= INSTRUCTIONS_PER_WEIGHT[bits]


def all_by_wgmma() -> dict[tuple, GemmShape]:
    """A problem for each variant by wgmma that is ever taken for these sizes, widths, groups and dtypes, by its macros."""
    multiprocessors, shared = ARCHITECTURES["sm_90a"]
    device = DeviceLimits(multiprocessors=multiprocessors, shared_bytes=1024 * shared, wgmma=True)
    found = {}
    for tokens, side, bits, group, zeros, dtype, slicing in itertools.product(
        (24, 64, 128, 300, 512),
        (4096, 8192, 16384),
        (2, 4, 6, 8),
        (32, 64, 128, 192),
        (False, True),
        (torch.float16, torch.bfloat16),
        ("msb", "round"),
    ):
        one = problem(
            bits,
            tokens,
            rows=side,
            depth=side,
            group_size=group,
            has_zero_points=zeros,
            dtype=dtype,
            scale_dtype=dtype,
            slicing=slicing,
        )
        made = make_launch_config(one, device)
        if made.defines["WGMMA"]:
            found[tuple(made.defines.items())] = one
    return found


def spills(one: GemmShape) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        return stack_bytes(cubin(one, "sm_90a"), Path(scratch)) > 0


if __name__ == "__main__":  # what experiments/kernels/README.md says of spilled registers
    variants = list(all_by_wgmma().values())
    with multiprocessing.get_context("spawn").Pool() as pool:
        spilling = [
            one for one, spilled in zip(variants, pool.map(spills, variants, chunksize=4), strict=True) if spilled
        ]
    print(f"{len(spilling)} of {len(variants)} variants spill", *spilling, sep="\n")
