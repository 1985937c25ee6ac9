"""Packed layout of bit planes, scales and zero points: the order in which ``kernels/gemm.cu`` reads them.

A matrix [N, K] is divided into tiles of 64 rows and 64 columns. Plane d (0 is the most significant bit) holds one bit of each
code. A warp reads a tile with one load of 16 bytes per lane. Word r of lane 4g + t has the bits of the columns
16r + 8u + 2t + h and of the rows 16c + 8p + g, with g in 0..7, t, r, c in 0..3 and u, h, p in 0..1. This is the fragment
order of ``mma.m16n8k16``: g and t index the lane, u and p the register, h its half. The position in the word is

    bit (2 + (1 - p) + 2c + 8u + 16h - d) mod 32

A byte holds eight rows of one column. Consecutive planes are rotated by one bit, so that the kernel merges two of them with one
instruction. Scales and zero points are stored as [groups, N/64, g, c, p], for all groups that the tiles of a row reach into.

Packing and unpacking both reduce to a transpose of 8 x 8 bits: eight codes against eight planes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from matquant.formats.groups import group_count

TILE = 64  # rows and columns of a tile
WORD = 32  # codes whose bits share a word
_BYTE = 8

# For k = 4, 2, 1: mask of the bits that keep their place when blocks of k x k bits are swapped, repeated over 64 bits.
_SWAPS = ((4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333), (1, 0x5555555555555555))


def tiles(size: int) -> int:
    """Number of tiles that cover ``size`` rows or columns."""
    return -(-size // TILE)


def stored_group_count(in_features: int, group_size: int) -> int:
    """Number of groups stored per row: one if the row is one group, else as many as its padded tiles reach into."""
    return 1 if group_size == in_features else group_count(tiles(in_features) * TILE, group_size)


def plane_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Shape of one packed plane: row tiles, column tiles, lanes, words."""
    return tiles(out_features), tiles(in_features), 32, 4


def group_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int, int, int, int]:
    """Shape of packed scales or zero points: groups, row tiles, g, c, p."""
    return stored_group_count(in_features, group_size), tiles(out_features), _BYTE, 4, 2


def pack_planes(codes: Tensor, count: int) -> Tensor:
    """Pack the first ``count`` planes of 8-bit codes.

    Args:
        codes: uint8 [N, K] with N and K multiples of 64; the most significant bit of a code is bit 7.

    Returns:
        int32 [count, N/64, K/64, 32 lanes, 4 words].
    """
    rows, columns = codes.shape
    tile = codes.view(rows // TILE, 4, 2, _BYTE, columns).flip(2)  # row block, c, 1-p, g, column
    octets = tile.permute(1, 2, 0, 3, 4).reshape(_BYTE, -1).view(torch.int64)  # row of the octet, eight columns a word
    planes = _transpose_bits(octets).view(torch.uint8).flip(0)[:count]  # plane, then row block, g, column
    shape = (count, rows // TILE, _BYTE, columns // TILE, 4, 2, 4, 2)  # plane, row block, g, tile, r, u, t, h
    words = planes.view(shape).permute(0, 1, 3, 2, 6, 4, 7, 5).reshape(count, rows // TILE, columns // TILE, 32, 16)
    return _rotate_planes(words.view(torch.int32), 2)


def unpack_planes(planes: Tensor) -> Tensor:
    """Inverse of ``pack_planes``: uint8 [N, K]. Bits of missing planes are 0."""
    count, row_tiles, column_tiles = planes.shape[:3]
    shape = (count, row_tiles, column_tiles, _BYTE, 4, 4, 2, 2)  # plane, row block, tile, g, t, r, h, u
    octets = _rotate_planes(planes, -2).view(torch.uint8).view(shape).permute(0, 1, 3, 2, 5, 7, 4, 6)
    bits = planes.new_zeros(_BYTE, *octets.shape[1:], dtype=torch.uint8)  # bit of the code, row block, g, column
    bits[_BYTE - count :] = octets.flip(0)
    codes = _transpose_bits(bits.view(_BYTE, -1).view(torch.int64)).view(torch.uint8)
    tile = codes.view(4, 2, row_tiles, _BYTE, column_tiles * TILE).flip(1)  # c, p, row block, g, column
    return tile.permute(2, 0, 1, 3, 4).reshape(row_tiles * TILE, column_tiles * TILE)


def rotate_plane_bits(plane: Tensor, by: int) -> Tensor:
    """Rotate the words of one plane left by ``by`` bits, right if negative. Plane d rotated by d is packed like plane 0."""
    by %= WORD
    return (plane << by) | ((plane >> (WORD - by)) & ~(-1 << by)) if by else plane


def pack_groups(values: Tensor, groups: int) -> Tensor:
    """Pack scales or zero points [N, groups of the layer] into [groups, N/64 rounded up, 8, 4, 2], padded with 0."""
    rows = tiles(values.shape[0]) * TILE
    padded = F.pad(values, (0, groups - values.shape[1], 0, rows - values.shape[0]))
    return padded.view(rows // TILE, 4, 2, _BYTE, groups).permute(4, 0, 3, 1, 2).contiguous()


def unpack_groups(packed: Tensor) -> Tensor:
    """Inverse of ``pack_groups``, padding included: [N rounded up to 64, groups]."""
    return packed.permute(1, 3, 4, 2, 0).reshape(-1, packed.shape[0])


def _transpose_bits(words: Tensor) -> Tensor:
    """Transpose 8 x 8 bits: bit j of byte n of row i becomes bit i of byte n of row j. int64 [8, words], overwritten.

    Three rounds swap blocks of 4, 2 and 1 bits between rows (Warren, Hacker's Delight, section 7-3).
    """
    for distance, mask in _SWAPS:
        pairs = words.view(_BYTE // (2 * distance), 2, distance, -1)
        low, high = pairs[:, 0], pairs[:, 1]
        swap = ((low >> distance) ^ high) & mask
        high ^= swap
        low ^= swap << distance
    return words


def _rotate_planes(words: Tensor, by: int) -> Tensor:
    """Rotate the words of each plane d (first dimension): left by ``by`` - d bits if ``by`` > 0, else left by ``by`` + d."""
    plane = torch.arange(words.shape[0], dtype=torch.int32, device=words.device).view(-1, *(1,) * (words.ndim - 1))
    left = ((by - plane) if by > 0 else (by + plane)) % WORD
    low = ~(-1 << left)  # bits that wrap around
    return (words << left) | ((words >> (WORD - left)) & low)
