"""Kernels by name, loaded once per device, and their launch."""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from matquant.cuda.arguments import Frame, Signature
from matquant.cuda.cuda_driver import Driver, nvrtc_compile, nvrtc_version
from matquant.cuda.source import compile_options, cubin, read_source
from matquant.errors import UserError

FREE_SHARED_BYTES = 48 * 1024  # dynamic shared memory that a kernel gets without asking

_modules: dict[tuple, int] = {}
_kernels: dict[tuple, "Kernel"] = {}
_loading = threading.Lock()


def load(
    source: str,
    name: str,
    *,
    defines: Mapping[str, int | str] | None = None,
    device: torch.device | str | int | None = None,
    options: Sequence[str] = (),
    prefer_shared: bool = False,
    overlap: bool = False,
) -> "Kernel":
    """The kernel ``name`` (``extern "C"``) of ``kernels/source``, compiled and loaded when it is first asked for.

    Args:
        defines: macros of the compilation.
        device: None is torch's current CUDA device.
        options: more of NVRTC's, such as ``--maxrregcount=128``.
        prefer_shared: leave L1 as small as it gets, so that several blocks with much shared memory fit a multiprocessor.
        overlap: the kernel waits itself for the one in front of it on the stream, so its launches may begin before that has
            ended, on devices that can do so.

    Raises:
        UserError: CuPy or NVRTC is not installed, there is no CUDA device, or no such source.
        RuntimeError: it does not compile, or has no such kernel.
    """
    driver = _driver()
    index = _device_index(device, driver)
    key = (source, tuple(sorted((defines or {}).items())), tuple(options), index)
    overlap = overlap and driver.can_overlap(index)
    kernel = _kernels.get((name, overlap, *key))
    if kernel is None:
        with _loading:
            module = _modules.get(key)
            if module is None:
                arguments = compile_options(driver.architecture(index), defines, options)
                binary = cubin(read_source(source), arguments, nvrtc_version(), nvrtc_compile)
                module = _modules[key] = driver.load(binary, index)
            function = driver.function(module, name)
            if prefer_shared:
                driver.prefer_shared(function)
            kernel = _kernels.setdefault((name, overlap, *key), Kernel(name, function, index, driver, overlap))
    return kernel


class Kernel:
    """A kernel on one device. Made by ``load``; may be launched from several threads at once.

    Attributes:
        name: of the function.
        device: index of the CUDA device.
    """

    def __init__(self, name: str, function: int, device: int, driver: Driver, overlap: bool = False) -> None:
        self.name, self.device = name, device
        self._function, self._driver, self._overlap = function, driver, overlap
        self._shared_bytes = FREE_SHARED_BYTES
        self._signature: Signature | None = None
        self._thread = threading.local()  # its frame; two threads must not write the same one

    def launch(
        self, grid: int | tuple[int, ...], block: int | tuple[int, ...], args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Enqueue on torch's current stream of the kernel's device. Does not wait, and allocates no device memory.

        Args:
            grid: blocks, in up to three dimensions.
            block: threads, likewise.
            args: a tensor becomes its address, None a null pointer, int an int32, float a float32, bytes a structure. Other
                types are given as ``ctypes`` or numpy scalars. Nothing compares them with the source; each must be of the
                same kind in every launch.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            ValueError: a tensor lies on another device.
            TypeError: an argument cannot be passed, or is not what it was in the first launch.
            RuntimeError: the launch was refused; the message says what was asked for.
        """
        try:
            frame = self._thread.frame
        except AttributeError:
            frame = self._new_frame(args)
        frame.write(args, self.device)
        driver, device = self._driver, self.device
        if shared_bytes > self._shared_bytes:
            self._allow_shared(shared_bytes)
        launch = (*_three(grid), *_three(block), shared_bytes, driver.current_stream(device), frame.address, 0)
        try:
            if driver.current_device() == device:
                driver.launch(self._function, device, self._overlap, *launch)
            else:
                with torch.cuda.device(device):
                    driver.launch(self._function, device, self._overlap, *launch)
        except RuntimeError as error:
            raise RuntimeError(
                f"The launch of {self.name} with grid {grid}, block {block} and {shared_bytes} bytes of shared memory "
                f"failed: {error}"
            ) from error

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._driver.registers(self._function)

    @property
    def local_bytes(self) -> int:
        """Local memory of a thread in bytes; spilled registers lie there."""
        return self._driver.local_bytes(self._function)

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks of ``threads`` threads fit on a multiprocessor at once."""
        if shared_bytes > self._shared_bytes:
            self._allow_shared(shared_bytes)
        return self._driver.blocks_per_multiprocessor(self._function, threads, shared_bytes)

    def _new_frame(self, args: Sequence[Any]) -> Frame:
        if self._signature is None:
            self._signature = Signature(args)
        self._thread.frame = Frame(self._signature)
        return self._thread.frame

    def _allow_shared(self, shared_bytes: int) -> None:
        try:
            self._driver.allow_shared(self._function, shared_bytes)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.name} asks for {shared_bytes} bytes of shared memory per block, which device {self.device} does "
                f"not have: {error}"
            ) from error
        self._shared_bytes = shared_bytes


def _three(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)[:3]


def _device_index(device: torch.device | str | int | None, driver: Driver) -> int:
    if device is None:
        return driver.current_device()
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise UserError(f"CUDA kernels run on CUDA devices, not on {device}.")
    return driver.current_device() if device.index is None else device.index


@functools.cache
def _driver() -> Driver:
    return Driver()
