"""Kernels by name, loaded once per device, and their launch."""

import functools
import itertools
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from matquant.cuda.arguments import Address, Frame, Signature
from matquant.cuda.cuda_driver import CudaDriver, nvrtc_compile, nvrtc_version
from matquant.cuda.source import compile_options, cubin, read_source
from matquant.errors import UserError

DEFAULT_SHARED_BYTES = 48 * 1024  # dynamic shared memory of a kernel without opt-in

_modules: dict[tuple[Any, ...], int] = {}
_kernels: dict[tuple[Any, ...], "Kernel"] = {}
_load_lock = threading.Lock()


def load(
    source: str,
    name: str,
    *,
    defines: Mapping[str, int | str] | None = None,
    device: torch.device | str | int | None = None,
    options: Sequence[str] = (),
    prefer_shared: bool = False,
    pdl: bool = False,
) -> "Kernel":
    """Load the kernel ``name`` (``extern "C"``) of ``kernels/source``; it is compiled at its first use.

    Args:
        defines: macros of the compilation.
        device: torch's current CUDA device if None.
        options: further options of NVRTC, such as ``--maxrregcount=128``.
        prefer_shared: use the largest shared-memory carveout, so that several CTAs with much shared memory fit a
            multiprocessor.
        pdl: launch with programmatic dependent launch, on devices that support it. The kernel has to synchronize with the
            previous kernel on its stream itself.

    Raises:
        UserError: CuPy or NVRTC is not installed, there is no CUDA device, or no such source.
        RuntimeError: it does not compile, or has no such kernel.
    """
    driver = _driver()
    index = _device_index(device, driver)
    key = (source, tuple(sorted((defines or {}).items())), tuple(options), index)
    pdl = pdl and driver.supports_pdl(index)
    kernel = _kernels.get((name, pdl, *key))
    if kernel is None:
        with _load_lock:
            module = _modules.get(key)
            if module is None:
                arguments = compile_options(driver.architecture(index), defines, options)
                binary = cubin(read_source(source), arguments, nvrtc_version(), nvrtc_compile)
                module = _modules[key] = driver.load(binary, index)
            function = driver.function(module, name)
            if prefer_shared:
                driver.prefer_shared(function)
            kernel = _kernels.setdefault((name, pdl, *key), Kernel(name, function, index, driver, pdl))
    return kernel


class Kernel:
    """Kernel on one device, from ``load``; may be launched from several threads at once.

    Attributes:
        name: of the function.
        device: index of the CUDA device.
    """

    def __init__(self, name: str, function: int, device: int, driver: CudaDriver, pdl: bool = False) -> None:
        self.name, self.device = name, device
        self._function, self._driver, self._pdl = function, driver, pdl
        self._shared_bytes = DEFAULT_SHARED_BYTES
        self._signature: Signature | None = None
        self._thread = threading.local()  # holds an argument frame per thread

    def launch(
        self, grid: int | tuple[int, ...], block: int | tuple[int, ...], args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Enqueue on torch's current stream of the kernel's device. Asynchronous; allocates no device memory.

        Args:
            grid: CTAs, in up to three dimensions.
            block: threads of a CTA, in up to three dimensions.
            args: a tensor or an ``Address`` is passed as an address, None as a null pointer, int as int32, float as float32,
                bytes as a structure; other types as ``ctypes`` or numpy scalars. They are not compared with the source, and
                must have the same types in every launch.
            shared_bytes: dynamic shared memory of a CTA.

        Raises:
            ValueError: a tensor lies on another device.
            TypeError: an argument cannot be passed, or has another type than in the first launch.
            RuntimeError: the driver refused the launch; the message holds its configuration.
        """
        try:
            frame = self._thread.frame
        except AttributeError:
            frame = self._new_frame(args)
        frame.write(args, self.device)
        driver, device = self._driver, self.device
        if shared_bytes > self._shared_bytes:
            self._allow_shared(shared_bytes)
        launch = (*_dimensions(grid, block), shared_bytes, driver.current_stream(device), frame.address, 0)
        try:
            if driver.current_device() == device:
                driver.launch(self._function, device, self._pdl, *launch)
            else:
                with torch.cuda.device(device):
                    driver.launch(self._function, device, self._pdl, *launch)
        except RuntimeError as error:
            raise RuntimeError(
                f"The launch of {self.name} with grid {grid}, block {block} and {shared_bytes} bytes of shared memory "
                f"failed: {error}"
            ) from error

    def prepare(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        shared_bytes: int,
        changing: slice,
    ) -> "PreparedLaunch | None":
        """Prepare repeated launches that differ in some addresses only; None without PDL.

        Args:
            grid, block, args, shared_bytes: as of ``launch``.
            changing: arguments that differ, which are addresses.
        """
        return PreparedLaunch(self, grid, block, args, shared_bytes, changing) if self._pdl else None

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._driver.registers(self._function)

    @property
    def local_bytes(self) -> int:
        """Local memory of a thread in bytes; it holds spilled registers."""
        return self._driver.local_bytes(self._function)

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int = 0) -> int:
        """Number of CTAs of ``threads`` threads that fit on a multiprocessor at once."""
        if shared_bytes > self._shared_bytes:
            self._allow_shared(shared_bytes)
        return self._driver.blocks_per_multiprocessor(self._function, threads, shared_bytes)

    def _new_frame(self, args: Sequence[Any]) -> Frame:
        frame = self._thread.frame = self._empty_frame(args)
        return frame

    def _empty_frame(self, args: Sequence[Any]) -> Frame:
        if self._signature is None:
            self._signature = Signature(args)
        return Frame(self._signature)

    def _allow_shared(self, shared_bytes: int) -> None:
        try:
            self._driver.allow_shared(self._function, shared_bytes)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.name} needs {shared_bytes} bytes of shared memory per CTA, more than device {self.device} has: {error}"
            ) from error
        self._shared_bytes = shared_bytes


class PreparedLaunch:
    """Launch of one kernel that is repeated with other addresses, from ``Kernel.prepare``; several threads may use it."""

    def __init__(
        self,
        kernel: Kernel,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        shared_bytes: int,
        changing: slice,
    ) -> None:
        self._kernel, self._args, self._changing = kernel, list(args), changing
        self._layout = struct.Struct(f"@{len(self._args[changing])}P")
        self._grid, self._block, self._shared_bytes = grid, block, shared_bytes
        self._thread = threading.local()  # holds an argument frame and a launch configuration per thread

    def launch(self, *addresses: int) -> None:
        """Enqueue as ``Kernel.launch`` does, with these addresses on the kernel's device; 0 for a null pointer."""
        kernel = self._kernel
        driver, device = kernel._driver, kernel.device
        try:
            frame, launch_prepared = self._thread.state
        except AttributeError:
            frame, launch_prepared = self._new_state()
        frame.overwrite(self._changing.start, self._layout, *addresses)
        if driver.current_device() == device:
            stream = driver.current_stream(device)
            if not launch_prepared(kernel._function, stream, frame.address):
                return
        # Another device is current, or the driver refused the launch: the full path switches, tries again, and raises.
        args = list(self._args)
        args[self._changing] = map(Address, addresses)
        kernel.launch(self._grid, self._block, args, self._shared_bytes)

    def _new_state(self) -> tuple[Frame, Callable[[int, int, int], int]]:
        kernel = self._kernel
        frame = kernel._empty_frame(self._args)
        frame.write(self._args, kernel.device)
        if self._shared_bytes > kernel._shared_bytes:
            kernel._allow_shared(self._shared_bytes)
        state = frame, kernel._driver.prepare(*_dimensions(self._grid, self._block), self._shared_bytes)
        self._thread.state = state
        return state


@functools.lru_cache(maxsize=4096)
def _dimensions(grid: int | tuple[int, ...], block: int | tuple[int, ...]) -> tuple[int, ...]:
    """Three dimensions of a grid, then those of a block."""
    sizes = ((size,) if isinstance(size, int) else size for size in (grid, block))
    return tuple(itertools.chain.from_iterable((*size, 1, 1)[:3] for size in sizes))


def _device_index(device: torch.device | str | int | None, driver: CudaDriver) -> int:
    if device is None:
        return driver.current_device()
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise UserError(f"CUDA kernels run on CUDA devices, not on {device}.")
    return driver.current_device() if device.index is None else device.index


@functools.cache
def _driver() -> CudaDriver:
    return CudaDriver()
