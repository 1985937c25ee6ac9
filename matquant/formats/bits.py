"""Bit-widths that a nested code can be read at."""

MIN_BITS, MAX_BITS = 2, 8
BIT_WIDTHS = range(MIN_BITS, MAX_BITS + 1)
