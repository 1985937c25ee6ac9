"""Launches that may begin before the kernel in front of them on the stream has ended (programmatic dependent launch).

CuPy has ``cuLaunchKernel`` alone; this is ``cuLaunchKernelEx`` with its one attribute, by ctypes (CUDA driver API, ``cuda.h``).
A kernel that is launched so must wait for the one in front before it touches anything that one may write; see
``kernels/device.cuh``.
"""

import ctypes
import threading

FIRST_CAPABILITY = (9, 0)  # compute capability from which devices can
_ALLOW = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: a union of 64 bytes, of which this attribute uses an int."""

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


class Overlap:
    """``cuLaunchKernelEx`` of one process.

    Raises:
        OSError, AttributeError: the driver's library is not found, or is older than CUDA 11.8.
    """

    def __init__(self) -> None:
        self._call = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._call.argtypes = (ctypes.c_void_p,) * 4
        self._thread = threading.local()

    def launch(self, function: int, *launch: int) -> int:
        """Enqueue; takes what ``cuLaunchKernel`` takes after the function, and returns the driver's status."""
        try:
            config, address = self._thread.config
        except AttributeError:
            config, address = self._new_config()
        config.grid[:] = launch[:3]
        config.block[:] = launch[3:6]
        config.shared_bytes, config.stream = launch[6], launch[7]
        return self._call(address, function, launch[8], None)

    def _new_config(self) -> tuple[_Config, int]:
        """This thread's. The attribute lives as long as what points at it."""
        allow = _Attribute(id=_ALLOW, value=1)
        config = _Config(attributes=ctypes.pointer(allow), count=1)
        self._thread.config = config, ctypes.addressof(config)
        return self._thread.config
