"""Compilation of CUDA kernels for the CPU emulator in ``kernels/cpu_emulator``, and launches on torch tensors.

    kernel = compile_kernel(read_source("gemm.cu"), "nested_gemm", {"BITS": 4, ...})
    kernel.launch(grid=(8,), block=(128,), args=[planes, ..., 1.0], shared_bytes=4096, seed=1)

The checks and the limits of the emulator are listed in ``kernels/cpu_emulator/emulator.h``.
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
from typing import Any

import torch
from torch import Tensor

from matquant.cuda.tma import TmaDescriptor, outer_stride
from matquant.formats.planes import holds_row_tiles
from matquant.paths import resource_root

KERNELS = resource_root() / "kernels"
RUNTIME = KERNELS / "cpu_emulator"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-DEMULATOR",
)
SANITIZE_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=undefined")
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # TensorMap of emulator.h
_VALUE, _BUFFER, _TENSOR_MAP = 0, 1, 2  # kinds of arguments in the file of program.cpp


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """TMA descriptor of a CPU tensor."""

    array: Tensor
    tiling: TmaDescriptor

    def encode(self, address: int) -> bytes:
        """Bytes of ``TensorMap`` in ``emulator.h``, for elements at ``address``."""
        sizes, box = ((1, 1, *shape)[-3:] for shape in (self.tiling.sizes, self.tiling.box))
        outer = outer_stride(self.array, self.tiling) // self.tiling.element_bytes
        strides = (outer, sizes[2]) if len(self.tiling.sizes) == 3 else (0, outer)
        whole = (address, self.tiling.element_bytes, *sizes, *box, self.tiling.swizzle_128b, *strides)
        return struct.pack("<Q8I2Q72x", *whole)


Argument = Tensor | TensorMap | int | float | ctypes._SimpleCData | None


class EmulatorError(RuntimeError):
    """Error that the emulator detected in a kernel: undefined behaviour, deadlock, or misuse of an asynchronous operation."""


def have_compiler() -> bool:
    """True if a C++ compiler is installed."""
    return shutil.which(COMPILER) is not None


def read_source(name: str) -> str:
    """Text of ``kernels/name`` with its local headers inlined, each once, except for ``device.cuh``."""
    included: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        header = match[1]
        if header in included:
            return ""
        included.add(header)
        return match[0] if header == "device.cuh" else inline(header)

    def inline(file: str) -> str:
        text = (KERNELS / file).read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"$', replace, text, flags=re.MULTILINE)

    return inline(name)


class EmulatedKernel:
    """Kernel compiled for the emulator.

    Args:
        build: shared library; for ``sanitize``, a program.
        function: name of the kernel.
        sanitize: the build has the address and undefined-behaviour sanitizers.
    """

    def __init__(self, build: Path, function: str, *, sanitize: bool) -> None:
        self.build, self.function = build, function
        self._library = None if sanitize else ctypes.CDLL(str(build))

    def launch(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Argument], shared_bytes: int = 0, seed: int = 0
    ) -> None:
        """Run the grid to completion.

        Args:
            grid: number of blocks in x, y, z; missing ones are 1.
            block: number of threads in x, y, z; missing ones are 1.
            args: one per kernel parameter: a CPU tensor or None for a pointer, an int for an int, a float for a
                float, a ctypes value for any other type.
            shared_bytes: dynamic shared memory of a block.
            seed: 0 runs threads and blocks in order, any other number shuffles them.

        Raises:
            EmulatorError: The kernel misbehaved; the message has the block, the thread and the operation.
            TypeError: The arguments do not match the kernel's parameters.
        """
        shape = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        if self._library is None:
            self._launch_program([*shape, shared_bytes, seed], args)
            return
        values = [_value(argument) for argument in args]
        self._check_sizes(values)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.launch_addresses(shape, pointers, shared_bytes, seed)

    def launch_addresses(self, shape: Sequence[int], pointers: Any, shared_bytes: int, seed: int = 0) -> None:
        """Run the grid with arguments as ``cuLaunchKernel`` takes them: a ctypes array with the address of each value.

        Args:
            shape: three dimensions of the grid, then those of a block.
        """
        assert self._library is not None
        message = ctypes.create_string_buffer(1024)
        failed = self._library.emulator_launch(
            (ctypes.c_uint32 * 3)(*shape[:3]),
            (ctypes.c_uint32 * 3)(*shape[3:]),
            ctypes.c_uint64(shared_bytes),
            ctypes.c_uint32(seed),
            pointers,
            message,
            ctypes.c_uint64(len(message)),
        )
        if failed:
            raise EmulatorError(message.value.decode())

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        assert self._library is not None
        return int(self._library.emulator_parameters())

    def _check_sizes(self, values: Sequence[ctypes._SimpleCData | ctypes.Array]) -> None:
        """Raise TypeError if the sizes of the arguments differ from those of the kernel's parameters."""
        assert self._library is not None
        sizes = (ctypes.c_int * self._library.emulator_parameters())()
        self._library.emulator_parameter_sizes(sizes)
        found = [ctypes.sizeof(value) for value in values]
        if list(sizes) != found:
            raise TypeError(f"{self.function} takes parameters of {list(sizes)} bytes, found {found}")

    def _launch_program(self, numbers: Sequence[int], args: Sequence[Argument]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "arguments"
            path.write_bytes(b"".join(_serialize(argument) for argument in args))
            command = [str(self.build), str(path), *map(str, numbers)]
            # The sanitizer's stack checks do not support the fibers' own stacks.
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
            if done.returncode:
                raise EmulatorError(done.stderr[:4000])
            _read_back(path.read_bytes(), args)


def _value(argument: Argument) -> ctypes._SimpleCData | ctypes.Array:
    """Ctypes value of a kernel parameter."""
    match argument:
        case TensorMap(array):
            buffer = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
            value = (ctypes.c_char * _MAP_BYTES).from_buffer(buffer, -ctypes.addressof(buffer) % _MAP_ALIGNMENT)
            value[:] = argument.encode(array.data_ptr())
            return value
        case None:
            return ctypes.c_void_p(0)
        case Tensor():
            if argument.device.type != "cpu" or not holds_row_tiles(argument):
                raise TypeError("the emulator takes CPU tensors that are contiguous but for the first dimension")
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            return ctypes.c_int32(argument)
        case float():
            return ctypes.c_float(argument)
        case _:
            return argument


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _serialize(argument: Argument) -> bytes:
    """Argument in the file format of ``program.cpp``."""
    if isinstance(argument, TensorMap):  # the program sets the address of the elements, which follow
        kind, data = _TENSOR_MAP, argument.encode(0) + _tensor_bytes(argument.array)
    elif isinstance(argument, Tensor):
        kind, data = _BUFFER, _tensor_bytes(argument)
    else:
        kind, data = _VALUE, bytes(_value(argument))
    return struct.pack("<qq", kind, len(data)) + data


def _read_back(data: bytes, args: Sequence[Argument]) -> None:
    """Copy the buffers of an argument file back to the tensors."""
    position = 0
    for argument in args:
        _, size = struct.unpack_from("<qq", data, position)
        position += 16
        if isinstance(argument, Tensor) and size:
            new = torch.frombuffer(bytearray(data[position : position + size]), dtype=torch.uint8)
            argument.view(-1).view(torch.uint8).copy_(new)
        position += size


def compile_kernel(
    source: str, function: str, defines: Mapping[str, object], *, sanitize: bool = False
) -> EmulatedKernel:
    """Compile a kernel for the CPU, or return the cached build of the same source and flags.

    Args:
        source: text of a ``.cu`` file, see ``read_source``.
        function: name of the kernel in it.
        defines: macros, as passed to NVRTC with ``-D``.
        sanitize: build with the address and undefined-behaviour sanitizers, as a program that each launch starts.

    Raises:
        RuntimeError: The source does not compile.
    """
    flags = [*FLAGS, *(SANITIZE_FLAGS if sanitize else ()), f"-I{KERNELS}"]
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    kind = "program" if sanitize else "library"

    def build(folder: Path, output: Path) -> None:
        text = folder / "kernel.cu"
        text.write_text(source)
        kernel = [f"-DEMULATOR_KERNEL={function}", f'-DEMULATOR_SOURCE="{text}"', str(RUNTIME / f"{kind}.cpp")]
        shared = [] if sanitize else ["-shared"]
        _run_compiler([*flags, *macros, *shared, *kernel, str(_runtime(tuple(flags))), "-o", str(output)])

    return EmulatedKernel(_cached([kind, source, function, *flags, *macros], build), function, sanitize=sanitize)


@functools.cache
def _runtime(flags: tuple[str, ...]) -> Path:
    """Object file of the runtime, which every kernel is linked to."""
    source = str(RUNTIME / "runtime.cpp")
    return _cached(["runtime", *flags], lambda _, output: _run_compiler([*flags, "-c", source, "-o", str(output)]))


def _cached(parts: Sequence[str], build: Callable[[Path, Path], None]) -> Path:
    """Cached output of ``build(folder, output)`` for the given parts, the compiler version and the runtime's headers."""
    key = hashlib.sha256("\0".join([*parts, _compiler_version()]).encode() + _headers()).hexdigest()[:24]
    path = cache_folder() / f"{parts[0]}-{key}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder) / "output.o"
            build(Path(folder), output)
            output.replace(path)  # atomic: several test processes may build the same kernel
    return path


def cache_folder() -> Path:
    """Folder of the cached builds. Names are content hashes, so entries are never stale and can be deleted at any time."""
    default = Path(tempfile.gettempdir()) / f"matquant-emulator-{os.getuid()}"
    folder = Path(os.environ.get("MATQUANT_EMULATOR_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in [KERNELS / "device.cuh", *sorted(RUNTIME.iterdir())])


def _run_compiler(arguments: Sequence[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The kernel does not compile for the emulator:\n{done.stderr[:4000]}")
