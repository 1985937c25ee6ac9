"""TMA descriptors: ``CUtensorMap`` of the CUDA driver API (``cuda.h``), for the loads of ``kernels/hopper.cuh``."""

import ctypes
import functools
import math
from typing import NamedTuple

from torch import Tensor

_BYTES = 128  # size of a CUtensorMap
_ALIGNMENT = 64
_TYPES = {2: 1, 8: 4}  # CU_TENSOR_MAP_DATA_TYPE_UINT16, UINT64, by element size; the type has no effect on a copy
_SWIZZLE_128B = 3  # CU_TENSOR_MAP_SWIZZLE_128B
_CACHE_LINES_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B


class TmaDescriptor(NamedTuple):
    """Specification of a TMA descriptor, without the address of the array.

    Attributes:
        element_bytes: 2 or 8.
        sizes: two or three sizes of the array in elements, the last dimension contiguous; rows begin at multiples of 16 bytes.
        box: sizes of one load; at most 256 in each dimension.
        swizzle_128b: 128-byte swizzle of rows of 128 bytes, as WGMMA operands need it.
    """

    element_bytes: int
    sizes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_128b: bool = False


def encode_tma_descriptor(array: Tensor, spec: TmaDescriptor) -> bytes:
    """Encode the TMA descriptor of an array as a kernel argument.

    Args:
        array: at an address that is a multiple of 16 bytes; contiguous but for its first dimension. Its torch dtype has no
            effect.

    Returns:
        128 bytes that hold the address of the array. They do not keep the array alive.

    Raises:
        RuntimeError: the driver refuses it.
    """
    return _encode(array.data_ptr(), spec, outer_stride(array, spec))


def outer_stride(array: Tensor, spec: TmaDescriptor) -> int:
    """Bytes between two elements of the first dimension of an array."""
    if array.is_contiguous():
        return spec.element_bytes * math.prod(spec.sizes[1:])
    return array.stride(0) * array.element_size()


@functools.lru_cache(maxsize=4096)
def _encode(address: int, spec: TmaDescriptor, outer: int) -> bytes:
    room = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    start = ctypes.addressof(room) + -ctypes.addressof(room) % _ALIGNMENT
    sizes, box = spec.sizes[::-1], spec.box[::-1]  # the driver's order begins with the contiguous dimension
    rank = len(sizes)
    strides = [spec.element_bytes * math.prod(sizes[: i + 1]) for i in range(rank - 2)] + [outer]
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        _TYPES[spec.element_bytes],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLE_128B if spec.swizzle_128b else 0,
        _CACHE_LINES_256,
        0,
    )
    if status:
        raise RuntimeError(f"The driver cannot encode the TMA descriptor {spec} at {address:#x}: CUDA error {status}")
    return ctypes.string_at(start, _BYTES)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
