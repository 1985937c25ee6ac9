"""Bit-widths that a nested code can be read at."""

import reprlib

from matquant.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
BIT_WIDTHS = range(MIN_BITS, MAX_BITS + 1)
STRICT_BITS = 4  # planes whose steps are halves; a stretch applies to the later ones
STRETCHES = (1.0, 1.25, 1.5)  # that kernels multiply exactly


def check_bits(value: object, name: str, max_bits: int, planes: str = "the planes of this checkpoint") -> int:
    """Return ``value`` if it is a bit-width that the available planes hold.

    Args:
        name: setting or layer that the bit-width belongs to, for the message.
        max_bits: largest bit-width that the planes hold.
        planes: description of the planes, for the message.

    Raises:
        UserError: ``value`` is no whole number in 2..8, or exceeds ``max_bits``.
    """
    if type(value) is not int or value not in BIT_WIDTHS:
        raise UserError(
            f"{name}: a bit-width must be a whole number in {MIN_BITS}..{MAX_BITS}; found {reprlib.repr(value)}."
        )
    if value > max_bits:
        raise UserError(
            f"{name}: {value} bits cannot be read; {planes} hold at most {max_bits} bits. Choose fewer bits, or pack or "
            "load more planes."
        )
    return value
