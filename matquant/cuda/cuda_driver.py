"""CUDA driver and NVRTC through CuPy, imported when the first kernel is loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from matquant.cuda.pdl import MIN_CAPABILITY, PdlLauncher
from matquant.errors import UserError

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: the first use of the device on this thread
_MIN_ARCH_SPECIFIC = 9  # major compute capability from which there are architecture-specific features: sm_90a


class CudaDriver:
    """CUDA driver through CuPy, with torch's devices and streams.

    Raises:
        UserError: CuPy is not installed, or torch sees no CUDA device.
    """

    def __init__(self) -> None:
        _require_cupy()
        if not torch.cuda.is_available():
            raise UserError(
                "CUDA kernels need an NVIDIA GPU, and torch sees none. Tensors on the CPU need no kernel; for a GPU check "
                "the driver (nvidia-smi) and that torch was built for CUDA."
            )
        from cupy_backends.cuda.api import driver, runtime

        self._driver, self._runtime = driver, runtime
        self._pdl = PdlLauncher(driver.check_status)
        self.current_stream = torch._C._cuda_getCurrentRawStream
        self.current_device = torch._C._cuda_getDevice

    def architecture(self, device: int) -> str:
        """Architecture of a device, ``sm_86`` or ``sm_90a``."""
        return architecture(torch.cuda.get_device_capability(device))

    def load(self, cubin: bytes, device: int) -> int:
        """Load a cubin for the life of the process; return the module handle."""
        self.use(device)
        return int(self._driver.moduleLoadData(cubin))

    def function(self, module: int, name: str) -> int:
        """Handle of a kernel of a loaded module."""
        return int(self._driver.moduleGetFunction(module, name))

    def prefer_shared(self, function: int) -> None:
        """Set the largest shared-memory carveout: by default the driver makes room for one CTA of a kernel only."""
        self._driver.funcSetAttribute(function, self._driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)

    def supports_pdl(self, device: int) -> bool:
        """Return True if the device supports programmatic dependent launch."""
        return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY

    def use(self, device: int) -> None:
        """Make the device's primary context, which torch uses, current on this thread."""
        torch.cuda.init()
        self._runtime.setDevice(device)

    def launch(self, function: int, device: int, pdl: bool, *launch: int) -> None:
        """Enqueue a kernel, with programmatic dependent launch if ``pdl``. Raises RuntimeError if the driver refuses it."""
        launch_kernel = self._pdl.launch if pdl else self._driver.launchKernel
        try:
            launch_kernel(function, *launch)
        except self._driver.CUDADriverError as error:
            if error.status != _INVALID_CONTEXT:
                raise RuntimeError(str(error)) from error
            self.use(device)
            launch_kernel(function, *launch)

    def prepare(self, *launch: int) -> Callable[[int, int, int], int]:
        """Prepare launches with programmatic dependent launch, see ``PdlLauncher.prepare``."""
        return self._pdl.prepare(*launch)

    def allow_shared(self, function: int, bytes_: int) -> None:
        """Set the maximum dynamic shared memory of a kernel. Raises RuntimeError if the device has less."""
        attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            self._driver.funcSetAttribute(function, attribute, bytes_)
        except self._driver.CUDADriverError as error:
            raise RuntimeError(str(error)) from error

    def registers(self, function: int) -> int:
        """Registers of a thread."""
        return int(self._driver.funcGetAttribute(self._driver.CU_FUNC_ATTRIBUTE_NUM_REGS, function))

    def local_bytes(self, function: int) -> int:
        """Local memory of a thread in bytes; more than 0 usually means spilled registers."""
        return int(self._driver.funcGetAttribute(self._driver.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function))

    def blocks_per_multiprocessor(self, function: int, threads: int, shared_bytes: int) -> int:
        """Number of CTAs of a kernel that a multiprocessor runs at once."""
        return int(self._driver.occupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared_bytes))


def architecture(capability: tuple[int, int]) -> str:
    """Name of a compute capability for NVRTC: (8, 6) is ``sm_86``, (9, 0) is ``sm_90a``."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= _MIN_ARCH_SPECIFIC else "")


def nvrtc_version() -> str:
    """Version of the NVRTC that CuPy finds, such as ``13.5``. Raises UserError without CuPy or NVRTC."""
    _require_cupy()
    from cupy_backends.cuda.libs import nvrtc

    try:
        return "{}.{}".format(*nvrtc.getVersion())
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"CuPy finds no NVRTC, which compiles the CUDA kernels: {error}. Install the CUDA toolkit, or the wheels with "
            f"pip install 'cupy-cuda{_cuda_major()}x[ctk]'."
        ) from error


def nvrtc_compile(name: str, text: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """Compile one source to a cubin; no GPU is needed.

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's log.
        UserError: CuPy or NVRTC is not installed.
    """
    nvrtc_version()
    from cupy_backends.cuda.libs import nvrtc

    included = [(content.encode(), include.encode()) for include, content in headers.items()]
    program = nvrtc.createProgram(
        text, name, [content for content, _ in included], [include for _, include in included]
    )
    try:
        nvrtc.compileProgram(program, tuple(options))
        # CuPy drops the last byte, a 0 that tools for ELF files expect.
        cubin: bytes = nvrtc.getCUBIN(program) + b"\0"
        return cubin
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{name} does not compile with {' '.join(options)}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _require_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UserError(
            f"CUDA kernels need CuPy, which is not installed ({error}). It comes with an extra: "
            "pip install 'matquant[gpu13]' for CUDA 13, 'matquant[gpu]' for CUDA 12; this torch was built for "
            f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU alone'}."
        ) from error
    return cupy


def _cuda_major() -> str:
    """Major CUDA version of torch, 12 or 13; 13 for a CPU build."""
    return "12" if str(torch.version.cuda).startswith("12.") else "13"
