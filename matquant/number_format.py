"""Formatting of figures: enough digits to compare, and no more."""

import math
from datetime import UTC, datetime
from typing import Any, TypeGuard

MISSING = "-"


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: Any, digits: int = 3) -> str:
    """Format with ``digits`` significant digits: plain between 0.0001 and 1e6, else with an exponent."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = abs(rounded)
    if not 1e-4 <= magnitude < 1e6:
        return f"{rounded:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    exponent = int(f"{rounded:e}".rpartition("e")[2])
    return f"{rounded:.{max(digits - 1 - exponent, 0)}f}"


def perplexity(value: Any) -> str:
    """Format with four significant digits and at most three decimals: neighbouring bit-widths differ in the third."""
    if is_number(value) and 1 <= value < 10:
        return f"{value:.3f}"
    return significant(value, 4)


def average_bits(value: Any) -> str:
    """Format with one to three decimals."""
    if not is_number(value):
        return MISSING
    text = f"{value:.3f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def score(value: Any) -> str:
    """Format the score of a task; shares of one get three decimals."""
    if is_number(value) and 0 <= value <= 1:
        return f"{value:.3f}"
    return significant(value, 4)


def size(value: Any) -> str:
    """Format bytes with a decimal unit."""
    if not is_number(value):
        return MISSING
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{significant(value / limit)} {unit}"
    return f"{value} B"


def megabytes(value: Any) -> str:
    """Format bytes in units of 10^6, without the unit."""
    return significant(value / 1e6) if is_number(value) else MISSING


def seconds(value: Any) -> str:
    """Format a duration in seconds, minutes or hours."""
    if not is_number(value):
        return MISSING
    if value < 100:
        return f"{significant(value, 2 if value < 10 else 3)} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def timestamp(iso: str) -> str:
    """Format an ISO time as ``2026-11-23 21:00 UTC``; any other text is returned unchanged."""
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def slice_name(bits: Any) -> str:
    """Name of a slice in a sentence."""
    return f"{bits} bits" if str(bits).isdigit() else str(bits)
