"""CUDA kernels from the sources in ``kernels/``: compiled for the device, cached on disk, launched on torch's stream.

    kernel = matquant.cuda.load("gemm.cu", "gemm", defines={"BITS": 3}, device=x.device)
    kernel.launch((n // 64, splits), 128, (planes, x, y, rows, 0.5), shared_bytes=65536)

Needs CuPy, the extra ``gpu`` (CUDA 12) or ``gpu13`` (CUDA 13), for NVRTC and the driver; all memory is allocated by torch.
CuPy is imported when the first kernel is loaded.
"""

from matquant.cuda.kernel import Kernel, PreparedLaunch, load
from matquant.cuda.source import CACHE_VARIABLE, Source, read_source

__all__ = ["CACHE_VARIABLE", "Kernel", "PreparedLaunch", "Source", "load", "read_source"]
