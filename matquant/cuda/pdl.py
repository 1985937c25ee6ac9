"""Programmatic dependent launch (PDL): a kernel may start before the previous kernel on its stream has ended.

CuPy has ``cuLaunchKernel`` only; this is ``cuLaunchKernelEx`` with the PDL attribute, by ctypes (CUDA driver API, ``cuda.h``).
A kernel launched this way must execute ``griddepcontrol.wait`` before it accesses memory that the previous kernel may write;
see ``kernels/device.cuh``.
"""

import ctypes
import threading

MIN_CAPABILITY = (9, 0)  # compute capability
_ALLOW = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: a union of 64 bytes; this attribute uses an int of it."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class PdlLauncher:
    """Launcher with programmatic dependent launch, by ``cuLaunchKernelEx``.

    Raises:
        OSError, AttributeError: the driver's library is not found, or is older than CUDA 11.8.
    """

    def __init__(self) -> None:
        self._call = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._call.argtypes = (ctypes.c_void_p,) * 4
        self._thread = threading.local()

    def launch(self, function: int, *launch: int) -> int:
        """Enqueue a kernel; arguments as of ``cuLaunchKernel``. Returns the status of the driver."""
        try:
            config, address = self._thread.config
        except AttributeError:
            config, address = self._new_config()
        config.grid[:] = launch[:3]
        config.block[:] = launch[3:6]
        config.shared_bytes, config.stream = launch[6], launch[7]
        status: int = self._call(address, function, launch[8], None)
        return status

    def _new_config(self) -> tuple[_Config, int]:
        """Configuration of this thread; it keeps the attribute alive."""
        allow = _Attribute(id=_ALLOW, value=1)
        config = _Config(attributes=ctypes.pointer(allow), count=1)
        found = self._thread.config = config, ctypes.addressof(config)
        return found
