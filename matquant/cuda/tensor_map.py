"""Matrices as ``copy_tile`` of ``kernels/hopper.cuh`` takes them: ``CUtensorMap`` of the CUDA driver API (``cuda.h``)."""

import ctypes
import functools

from torch import Tensor

_BYTES = 128  # of a CUtensorMap
_ALIGNMENT = 64
_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16: bits are copied, whatever they mean
_TILE_COLUMNS = 64  # 128 bytes, which is the span of the order of pieces
_TURNED_128 = 3  # CU_TENSOR_MAP_SWIZZLE_128B
_CACHE_LINES_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B


def tensor_map(matrix: Tensor, tile_rows: int) -> bytes:
    """A kernel's argument for a matrix that it copies in tiles.

    Args:
        matrix: [rows, columns] of a 16-bit dtype, contiguous from a multiple of 16 bytes on, columns a multiple of 8.
        tile_rows: at most 256; a tile has 64 columns.

    Returns:
        128 bytes; they hold the address of the matrix, and not the matrix.

    Raises:
        RuntimeError: the driver refuses it.
    """
    return _encode(matrix.data_ptr(), *matrix.shape, tile_rows)


@functools.lru_cache(maxsize=4096)
def _encode(address: int, rows: int, columns: int, tile_rows: int) -> bytes:
    room = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    start = ctypes.addressof(room) + -ctypes.addressof(room) % _ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), _UINT16, 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns), (ctypes.c_uint32 * 2)(_TILE_COLUMNS, tile_rows), (ctypes.c_uint32 * 2)(1, 1),
        0, _TURNED_128, _CACHE_LINES_256, 0,
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"The driver makes no tensor map of a matrix [{rows}, {columns}] at {address:#x} with tiles of {tile_rows} rows: "
            f"CUDA error {status}"
        )
    return ctypes.string_at(start, _BYTES)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
