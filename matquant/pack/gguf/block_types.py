"""Types of GGUF tensors that hold layers: size of their blocks, and their bytes.

Layouts are those of ggml (``ggml-common.h``), in which ``gguf.quants`` reads them too. ``Q4_0``, ``Q5_0`` and ``Q8_0`` hold
d * n with a float16 d for each block of 32 columns. The K types have blocks of 256 columns, see ``k_quants``.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from matquant.pack.gguf import k_quants
from matquant.pack.integer_grid import fit_groups

QUANT_BLOCK = 32

Encoder = Callable[[Tensor], Tensor]  # float32 [blocks, block size] -> uint8 [blocks, block bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockType:
    """Type of a quantized GGUF tensor.

    Attributes:
        name: of the type in ggml.
        bits: of a code.
        block_size: columns of a block.
        block_bytes: bytes of a block.
        nearest: encoder of any values, with the least squared error that it finds.
    """

    name: str
    bits: int
    block_size: int
    block_bytes: int
    nearest: Encoder

    def fits(self, in_features: int) -> bool:
        """True if rows consist of whole blocks."""
        return in_features % self.block_size == 0

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row."""
        return in_features // self.block_size * self.block_bytes


def pack_numbers(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Blocks of ``Q4_0`` (4 bits), ``Q5_0`` (5) or ``Q8_0`` (8).

    Args:
        numbers: whole numbers in -2^(bits - 1)..2^(bits - 1) - 1, [blocks, 32].
        scales: float16 [blocks].

    Returns:
        uint8 [blocks, block bytes].
    """
    head = scales[:, None].contiguous().view(torch.uint8)
    if bits == 8:
        return torch.cat([head, numbers.to(torch.int8).view(torch.uint8)], 1)
    codes = (numbers + 2 ** (bits - 1)).to(torch.uint8)
    half = QUANT_BLOCK // 2
    low = (codes[:, :half] & 15) | ((codes[:, half:] & 15) << 4)
    if bits == 4:
        return torch.cat([head, low], 1)
    fifth = ((codes >> 4).view(-1, 4, 8) << torch.arange(8)).sum(2).to(torch.uint8)
    return torch.cat([head, fifth, low], 1)


def _nearest_numbers(bits: int) -> Encoder:
    def encode(blocks: Tensor) -> Tensor:
        codes, scales = fit_groups(blocks[:, None, :], bits, torch.float16)
        return pack_numbers(codes[:, 0].int() - 2 ** (bits - 1), scales[:, 0], bits)

    return encode


WHOLE_NUMBERS = (
    BlockType("Q4_0", 4, QUANT_BLOCK, 18, _nearest_numbers(4)),
    BlockType("Q5_0", 5, QUANT_BLOCK, 22, _nearest_numbers(5)),
    BlockType("Q8_0", 8, QUANT_BLOCK, 34, _nearest_numbers(8)),
)
BLOCK_TYPES = (
    BlockType("Q2_K", 2, k_quants.BLOCK, 84, k_quants.encode_q2),
    BlockType("Q3_K", 3, k_quants.BLOCK, 110, k_quants.encode_q3),
    WHOLE_NUMBERS[0],
    BlockType("Q4_K", 4, k_quants.BLOCK, 144, k_quants.encode_q4),
    WHOLE_NUMBERS[1],
    BlockType("Q5_K", 5, k_quants.BLOCK, 176, k_quants.encode_q5),
    BlockType("Q6_K", 6, k_quants.BLOCK, 210, k_quants.encode_q6),
    WHOLE_NUMBERS[2],
)


def nearest_candidates(bits: int, in_features: int) -> tuple[BlockType, ...]:
    """Types with the smallest codes of at least ``bits`` bits that rows of ``in_features`` columns can have."""
    fitting = [one for one in BLOCK_TYPES if one.bits >= bits and one.fits(in_features)]
    least = min(one.bits for one in fitting)
    return tuple(one for one in fitting if one.bits == least)
