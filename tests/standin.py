"""Runs the CUDA sources on a CPU: compiles a kernel against ``kernels/standin`` and launches it on torch tensors.

    kernel = compile_kernel(read_source("plane_gemm.cu"), "plane_gemm", {"BITS": 4})
    kernel.launch(grid=(8,), block=(128,), args=[planes, scales, x, y, 5, 1.0], shared_bytes=4096, seed=1)

What the stand-in checks and what it cannot show is said in ``kernels/standin/standin.h``.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matquant.cuda.tma import TmaDescriptor
from matquant.paths import resource_root

KERNELS = resource_root() / "kernels"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-DSTANDIN",
)
SANITIZE_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=undefined")


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """An array that is copied in tiles."""

    array: Tensor
    tiling: TmaDescriptor

    def packed(self, address: int) -> bytes:
        """``TensorMap`` of kernels/standin/standin.h."""
        sizes, tile = ((1, 1, *of)[-3:] for of in (self.tiling.sizes, self.tiling.tile))
        return struct.pack("<Q8I88x", address, self.tiling.element_bytes, *sizes, *tile, self.tiling.turned)


Argument = Tensor | TensorMap | int | float | ctypes._SimpleCData | None


class StandinError(RuntimeError):
    """The kernel did something that a GPU would not survive, or compute something undefined from."""


def have_compiler() -> bool:
    """Whether a C++ compiler is there."""
    return shutil.which(COMPILER) is not None


def read_source(name: str) -> str:
    """The text of ``kernels/name`` with its local headers put in, each once, except for ``device.cuh`` itself."""
    there: set[str] = set()

    def insert(match: re.Match[str]) -> str:
        header = match[1]
        if header in there:
            return ""
        there.add(header)
        return match[0] if header == "device.cuh" else inserted(header)

    def inserted(file: str) -> str:
        text = (KERNELS / file).read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"$', insert, text, flags=re.MULTILINE)

    return inserted(name)


class StandinKernel:
    """One compiled kernel. ``build`` is a shared library, or a program when it was compiled for the sanitizer."""

    def __init__(self, build: Path, function: str, *, sanitize: bool) -> None:
        self.build, self.function, self.sanitize = build, function, sanitize
        self._library = None if sanitize else ctypes.CDLL(str(build))

    def launch(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Argument], shared_bytes: int = 0, seed: int = 0
    ) -> None:
        """Runs the grid to its end.

        Args:
            grid: blocks in x, y, z; missing ones are 1.
            block: threads in x, y, z; missing ones are 1.
            args: one for each parameter of the kernel: a contiguous CPU tensor or None for a pointer, an int for an int, a
                float for a float, a ctypes value for anything else.
            shared_bytes: dynamic shared memory of a block.
            seed: 0 runs threads and blocks in order, another number shuffles them.

        Raises:
            StandinError: with the block, the thread and what it did.
        """
        shape = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        if self._library is None:
            self._launch_program([*shape, shared_bytes, seed], args)
            return
        values = [_value(a) for a in args]
        self._check_sizes(values)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        message = ctypes.create_string_buffer(1024)
        failed = self._library.standin_launch(
            (ctypes.c_uint32 * 3)(*shape[:3]),
            (ctypes.c_uint32 * 3)(*shape[3:]),
            ctypes.c_uint64(shared_bytes),
            ctypes.c_uint32(seed),
            pointers,
            message,
            ctypes.c_uint64(len(message)),
        )
        if failed:
            raise StandinError(message.value.decode())

    def _check_sizes(self, values: Sequence[ctypes._SimpleCData | ctypes.Array]) -> None:
        """A launch on a GPU reads past short arguments; here they are refused."""
        assert self._library is not None
        sizes = (ctypes.c_int * self._library.standin_parameters())()
        self._library.standin_parameter_sizes(sizes)
        found = [ctypes.sizeof(v) for v in values]
        if list(sizes) != found:
            raise TypeError(f"{self.function} takes parameters of {list(sizes)} bytes, not {found}")

    def _launch_program(self, numbers: Sequence[int], args: Sequence[Argument]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "arguments"
            path.write_bytes(b"".join(_packed(a) for a in args))
            command = [str(self.build), str(path), *map(str, numbers)]
            # Fibers have stacks of their own, which the sanitizer's model of one stack does not know.
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
            if done.returncode:
                raise StandinError(done.stderr[:4000])
            _read_back(path.read_bytes(), args)


def _value(argument: Argument) -> ctypes._SimpleCData | ctypes.Array:
    match argument:
        case TensorMap(array):
            room = ctypes.create_string_buffer(192)  # for 128 bytes at a multiple of 64
            value = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
            value[:] = argument.packed(array.data_ptr())
            return value
        case None:
            return ctypes.c_void_p(0)
        case Tensor():
            if argument.device.type != "cpu" or not argument.is_contiguous():
                raise TypeError("the stand-in takes contiguous CPU tensors")
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            return ctypes.c_int32(argument)
        case float():
            return ctypes.c_float(argument)
        case _:
            return argument


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _packed(argument: Argument) -> bytes:
    if isinstance(argument, TensorMap):  # the program puts the address of the bytes that follow into it
        data = argument.packed(0) + _bytes(argument.array)
        return struct.pack("<qq", 2, len(data)) + data
    data = _bytes(argument) if isinstance(argument, Tensor) else bytes(_value(argument))
    return struct.pack("<qq", isinstance(argument, Tensor), len(data)) + data


def _read_back(data: bytes, args: Sequence[Argument]) -> None:
    position = 0
    for argument in args:
        _, size = struct.unpack_from("<qq", data, position)
        position += 16
        if isinstance(argument, Tensor) and size:
            new = torch.frombuffer(bytearray(data[position : position + size]), dtype=torch.uint8)
            argument.view(-1).view(torch.uint8).copy_(new)
        position += size


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _headers() -> bytes:
    return b"".join(p.read_bytes() for p in [KERNELS / "device.cuh", *sorted((KERNELS / "standin").iterdir())])


def cache_folder() -> Path:
    """Where builds are kept: named after what made them, so they are never stale and can be deleted at any time."""
    folder = Path(
        os.environ.get("MATQUANT_STANDIN_CACHE", Path(tempfile.gettempdir()) / f"matquant-standin-{os.getuid()}")
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def compile_kernel(
    source: str, function: str, defines: Mapping[str, object], *, sanitize: bool = False
) -> StandinKernel:
    """A kernel built for the CPU, from the cache if the same one was built before.

    Args:
        source: the text of a ``.cu`` file, see ``read_source``.
        function: the name of the kernel in it.
        defines: macros, as NVRTC would get with ``-D``.
        sanitize: build with the address and undefined-behaviour sanitizers, as a program that each launch starts.
    """
    flags = [*FLAGS, *(SANITIZE_FLAGS if sanitize else ()), f"-I{KERNELS}"]
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    name = "program" if sanitize else "library"

    def build(folder: Path, made: Path) -> None:
        text = folder / "kernel.cu"
        text.write_text(source)
        kernel = [
            f"-DSTANDIN_KERNEL={function}",
            f'-DSTANDIN_SOURCE="{text}"',
            str(KERNELS / "standin" / f"{name}.cpp"),
        ]
        _run(
            [*flags, *macros, *([] if sanitize else ["-shared"]), *kernel, str(_runtime(tuple(flags))), "-o", str(made)]
        )

    return StandinKernel(_cached([name, source, function, *flags, *macros], build), function, sanitize=sanitize)


@functools.cache
def _runtime(flags: tuple[str, ...]) -> Path:
    """What every kernel is linked to."""
    source = str(KERNELS / "standin" / "runtime.cpp")
    return _cached(["runtime", *flags], lambda _, made: _run([*flags, "-c", source, "-o", str(made)]))


def _cached(parts: Sequence[str], build: Callable[[Path, Path], None]) -> Path:
    """The file that ``build`` makes in a folder of its own, or that it made before from the same parts and headers."""
    key = hashlib.sha256("\0".join([*parts, _compiler_version()]).encode() + _headers()).hexdigest()[:24]
    kept = cache_folder() / f"{parts[0]}-{key}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / "made.o"
            build(Path(folder), made)
            made.replace(kept)  # atomic: tests in several processes may build the same kernel
    return kept


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The stand-in does not compile:\n{done.stderr[:4000]}")
