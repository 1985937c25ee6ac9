"""NVRTC without CuPy and without a GPU, through ctypes."""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the wheel ``nvidia-cuda-nvrtc-cu12`` (part of the ``dev`` extra); None if it is not installed."""
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    folders = [] if spec is None or not spec.submodule_search_locations else list(spec.submodule_search_locations)
    found = [path for folder in folders for path in (Path(folder) / "lib").glob("libnvrtc.so.*")]
    return ctypes.CDLL(str(found[0])) if found else None


def compile_cubin(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Cubin of a translation unit without includes, and the compiler's log.

    Raises:
        RuntimeError: The source does not compile; the message holds the compiler's log.
    """
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        log = _read(nvrtc, program, "ProgramLog").decode("latin-1")
        if failed:
            raise RuntimeError(f"{name} {' '.join(options)}\n{log}")
        return _read(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, output: str) -> bytes:
    """Output of a compiled program: ``ProgramLog`` or ``CUBIN``."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{output}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{output}")(program, data)
    return data.raw
