"""Codes as bit planes, in the order in which the matmul of ``kernels/gemm.cu`` reads them, and back.

A matrix [N, K] is cut into tiles of 64 rows and 64 columns, and plane d (0 is the most significant bit) holds one bit of
each code. A warp reads a tile with one load of 16 bytes per lane: word r of lane 4g + t has the bits of the columns
16r + 8u + 2t + h and of the rows 16c + 8p + g, with g in 0..7, t, r, c in 0..3 and u, h, p in 0..1, which is the fragment
order of ``mma.m16n8k16`` (g and t name the lane, u and p the register, h its half). Their place in the word is

    bit (2 + (1 - p) + 2c + 8u + 16h - d) mod 32

so that a byte holds the eight rows of one column, and the planes are turned against each other by a bit each, which lets the
kernel merge them with one instruction per pair. Scales and zero points lie as [groups, N/64, g, c, p].

Both directions come down to transposing 8 x 8 bits: eight codes against eight planes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # rows and columns of a tile
WORD = 32  # codes whose bits share a word
_BYTE = 8

# For k = 4, 2, 1: the bits that stay when blocks of k x k bits are swapped, repeated over a 64-bit word.
_SWAPS = ((4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333), (1, 0x5555555555555555))


def tiles(size: int) -> int:
    """How many tiles cover ``size`` rows or columns."""
    return -(-size // TILE)


def pack_planes(codes: Tensor, count: int) -> Tensor:
    """The first ``count`` planes of 8-bit codes.

    Args:
        codes: uint8 [N, K], N and K multiples of 64, the most significant of their bits in bit 7.

    Returns:
        int32 [count, N/64, K/64, 32 lanes, 4 words].
    """
    rows, columns = codes.shape
    tile = codes.view(rows // TILE, 4, 2, _BYTE, columns).flip(2)  # row block, c, 1-p, g, column
    octets = tile.permute(1, 2, 0, 3, 4).reshape(_BYTE, -1).view(torch.int64)  # row of the octet, eight columns a word
    planes = _transpose_bits(octets).view(torch.uint8).flip(0)[:count]  # plane, then row block, g, column
    shape = (count, rows // TILE, _BYTE, columns // TILE, 4, 2, 4, 2)  # plane, row block, g, tile, r, u, t, h
    words = planes.view(shape).permute(0, 1, 3, 2, 6, 4, 7, 5).reshape(count, rows // TILE, columns // TILE, 32, 16)
    return _rotate(words.view(torch.int32), 2)


def unpack_planes(planes: Tensor) -> Tensor:
    """What ``pack_planes`` packed: uint8 [N, K], with zeros for the bits of planes that are not there."""
    count, row_tiles, column_tiles = planes.shape[:3]
    shape = (count, row_tiles, column_tiles, _BYTE, 4, 4, 2, 2)  # plane, row block, tile, g, t, r, h, u
    octets = _rotate(planes, -2).view(torch.uint8).view(shape).permute(0, 1, 3, 2, 5, 7, 4, 6)
    bits = planes.new_zeros(_BYTE, *octets.shape[1:], dtype=torch.uint8)  # bit of the code, row block, g, column
    bits[_BYTE - count :] = octets.flip(0)
    codes = _transpose_bits(bits.view(_BYTE, -1).view(torch.int64)).view(torch.uint8)
    tile = codes.view(4, 2, row_tiles, _BYTE, column_tiles * TILE).flip(1)  # c, p, row block, g, column
    return tile.permute(2, 0, 1, 3, 4).reshape(row_tiles * TILE, column_tiles * TILE)


def turn_plane(plane: Tensor, by: int) -> Tensor:
    """The words of one plane turned left by ``by`` bits (right if negative): plane d turned by d is packed as plane 0 is."""
    by %= WORD
    return (plane << by) | ((plane >> (WORD - by)) & ~(-1 << by)) if by else plane


def pack_groups(values: Tensor, groups: int) -> Tensor:
    """Scales or zero points [N, groups of the layer] as [groups, N/64 (rounded up), 8, 4, 2]; what is added is 0."""
    rows = tiles(values.shape[0]) * TILE
    padded = F.pad(values, (0, groups - values.shape[1], 0, rows - values.shape[0]))
    return padded.view(rows // TILE, 4, 2, _BYTE, groups).permute(4, 0, 3, 1, 2).contiguous()


def unpack_groups(packed: Tensor) -> Tensor:
    """What ``pack_groups`` packed, with what it added: [N rounded up to 64, groups]."""
    return packed.permute(1, 3, 4, 2, 0).reshape(-1, packed.shape[0])


def _transpose_bits(words: Tensor) -> Tensor:
    """Transpose 8 x 8 bits: bit j of byte n of row i becomes bit i of byte n of row j. int64 [8, words], overwritten.

    Three rounds of exchanges between rows, of blocks of 4, 2 and 1 bits (Warren, Hacker's Delight, section 7-3).
    """
    for distance, mask in _SWAPS:
        pairs = words.view(_BYTE // (2 * distance), 2, distance, -1)
        low, high = pairs[:, 0], pairs[:, 1]
        swap = ((low >> distance) ^ high) & mask
        high ^= swap
        low ^= swap << distance
    return words


def _rotate(words: Tensor, by: int) -> Tensor:
    """Words of plane d (the first dimension) turned left by ``by`` less d bits, or right by as much where ``by`` < 0."""
    plane = torch.arange(words.shape[0], dtype=torch.int32, device=words.device).view(-1, *(1,) * (words.ndim - 1))
    left = ((by - plane) if by > 0 else (by + plane)) % WORD
    low = ~(-1 << left)  # the bits that come in from the other end
    return (words << left) | ((words >> (WORD - left)) & low)
