"""Programmatic dependent launch (PDL): a kernel may start before the previous kernel on its stream has ended.

CuPy has ``cuLaunchKernel`` only; this is ``cuLaunchKernelEx`` with the PDL attribute, by ctypes (CUDA driver API, ``cuda.h``).
A kernel launched this way must execute ``griddepcontrol.wait`` before it accesses memory that the previous kernel may write;
see ``kernels/device.cuh``.
"""

import ctypes
import struct
import threading
from collections.abc import Callable

MIN_CAPABILITY = (9, 0)  # compute capability
_ALLOW = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


_CONFIG = struct.Struct("@7I4xQQI4x")  # CUlaunchConfig: grid, block, shared bytes, stream, attributes, their number
_STREAM, _STREAM_OFFSET = struct.Struct("@Q"), 32  # of CUlaunchConfig
_ATTRIBUTE = struct.Struct("@i4xi60x")  # CUlaunchAttribute: its id, and a union of 64 bytes, of which PDL uses an int


class PdlLauncher:
    """Launcher with programmatic dependent launch, by ``cuLaunchKernelEx``.

    Args:
        check_status: raises an error for a status of the driver that is not 0.

    Raises:
        OSError, AttributeError: the driver's library is not found, or is older than CUDA 11.8.
    """

    def __init__(self, check_status: Callable[[int], None]) -> None:
        self._call = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._call.argtypes = (ctypes.c_void_p,) * 4
        self._check_status = check_status
        self._attribute = ctypes.create_string_buffer(_ATTRIBUTE.pack(_ALLOW, 1))
        self._attribute_address = ctypes.addressof(self._attribute)
        self._thread = threading.local()

    def launch(self, function: int, *launch: int) -> None:
        """Enqueue a kernel; arguments as of ``cuLaunchKernel``. Raises the error of ``check_status``."""
        try:
            config, address = self._thread.config
        except AttributeError:
            config, address = self._new_config()
        _CONFIG.pack_into(config, 0, *launch[:8], self._attribute_address, 1)
        if status := self._call(address, function, launch[8], None):
            self._check_status(status)

    def prepare(self, *launch: int) -> Callable[[int, int, int], int]:
        """Prepare launches with one grid, block and shared memory, on one thread at a time.

        Args:
            launch: grid, block and bytes of shared memory.

        Returns:
            Function of the kernel, the stream and the address of the arguments; it launches and returns the driver's status.
        """
        config = ctypes.create_string_buffer(_CONFIG.size)
        _CONFIG.pack_into(config, 0, *launch, 0, self._attribute_address, 1)
        call, write_stream, address = self._call, _STREAM.pack_into, ctypes.addressof(config)

        def launch_prepared(function: int, stream: int, arguments: int) -> int:
            write_stream(config, _STREAM_OFFSET, stream)
            status: int = call(address, function, arguments, None)
            return status

        return launch_prepared

    def _new_config(self) -> tuple[ctypes.Array[ctypes.c_char], int]:
        """Memory of this thread for the configuration of one launch at a time, and its address."""
        config = ctypes.create_string_buffer(_CONFIG.size)
        found = self._thread.config = config, ctypes.addressof(config)
        return found
