"""Arrays as ``copy_tile`` of ``kernels/hopper.cuh`` takes them: ``CUtensorMap`` of the CUDA driver API (``cuda.h``)."""

import ctypes
import functools
from typing import NamedTuple

from torch import Tensor

_BYTES = 128  # of a CUtensorMap
_ALIGNMENT = 64
_TYPES = {2: 1, 8: 4}  # CU_TENSOR_MAP_DATA_TYPE_UINT16, UINT64, by bytes: bits are copied, whatever they mean
_TURNED_128 = 3  # CU_TENSOR_MAP_SWIZZLE_128B
_CACHE_LINES_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B


class Tiling(NamedTuple):
    """How an array is copied in tiles.

    Attributes:
        element_bytes: 2 or 8.
        sizes: of the array in elements, two or three, the last one contiguous; rows begin at multiples of 16 bytes.
        tile: likewise; at most 256 in each dimension.
        turned: for products by wgmma: rows of 128 bytes, whose pieces are put in the order that it wants.
    """

    element_bytes: int
    sizes: tuple[int, ...]
    tile: tuple[int, ...]
    turned: bool = False


def tensor_map(array: Tensor, tiling: Tiling) -> bytes:
    """A kernel's argument for an array that it copies in tiles.

    Args:
        array: contiguous from a multiple of 16 bytes on; its elements may be others to torch.
        tiling: of it.

    Returns:
        128 bytes; they hold the address of the array, and not the array.

    Raises:
        RuntimeError: the driver refuses it.
    """
    return _encode(array.data_ptr(), tiling)


@functools.lru_cache(maxsize=4096)
def _encode(address: int, tiling: Tiling) -> bytes:
    room = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    start = ctypes.addressof(room) + -ctypes.addressof(room) % _ALIGNMENT
    sizes, tile = tiling.sizes[::-1], tiling.tile[::-1]  # the driver begins with the contiguous one
    rank, strides, stride = len(sizes), [], tiling.element_bytes
    for size in sizes[:-1]:
        stride *= size
        strides.append(stride)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        _TYPES[tiling.element_bytes],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*tile),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _TURNED_128 if tiling.turned else 0,
        _CACHE_LINES_256,
        0,
    )
    if status:
        raise RuntimeError(f"The driver makes no tensor map of {tiling} at {address:#x}: CUDA error {status}")
    return ctypes.string_at(start, _BYTES)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
