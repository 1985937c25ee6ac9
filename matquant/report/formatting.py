"""Figures as people read them: enough digits to compare, none that mean nothing."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from matquant.report.results import is_number

MISSING = "-"


def significant(value: Any, digits: int = 3) -> str:
    """``value`` with so many significant digits: plain between 0.0001 and 1e6, else with an exponent."""
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
    """Four significant digits, three decimals at most: neighbouring widths differ in the third."""
    if is_number(value) and 1 <= value < 10:
        return f"{value:.3f}"
    return significant(value, 4)


def average_bits(value: Any) -> str:
    """At least one decimal, at most three."""
    if not is_number(value):
        return MISSING
    text = f"{value:.3f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def score(value: Any) -> str:
    """A task's score; shares of one get three decimals."""
    if is_number(value) and 0 <= value <= 1:
        return f"{value:.3f}"
    return significant(value, 4)


def size(value: Any) -> str:
    """Bytes with a decimal unit."""
    if not is_number(value):
        return MISSING
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{significant(value / limit)} {unit}"
    return f"{value} B"


def megabytes(value: Any) -> str:
    """Bytes in units of 10^6, without the unit."""
    return significant(value / 1e6) if is_number(value) else MISSING


def seconds(value: Any) -> str:
    """A duration: seconds, then minutes, then hours."""
    if not is_number(value):
        return MISSING
    if value < 100:
        return f"{significant(value, 2 if value < 10 else 3)} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(iso: str) -> str:
    """``2026-11-23T21:00:00+00:00`` as ``2026-11-23 21:00 UTC``; what is no such time stays as it is."""
    try:
        time = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def width(bits: Any) -> str:
    """A slice's name in a sentence."""
    return f"{bits} bits" if str(bits).isdigit() else str(bits)


def cost(results: Mapping[str, Any], models: list[Mapping[str, Any]]) -> str:
    """One sentence: what quantizing took and what the stored models weigh.

    ``models`` are the parent, or a dedicated method's models (`matquant.report.results.parents`).
    """
    total = sum(m["bytes"] for m in models if is_number(m.get("bytes")))
    reused = sum(bool(m.get("reused")) for m in models)
    took = results.get("seconds", {}).get("quantize")
    made = f"Quantized in {seconds(took)}" if is_number(took) else "Quantized"
    if len(models) <= 1:
        made = "Parent reused from the store" if reused else made
        return f"{made}; the parent takes {size(total)}." if total else f"{made}."
    if reused == len(models):
        made = "All models reused from the store"
    elif reused:
        made += f" ({reused} of {len(models)} models reused)"
    return f"{made}; {len(models)} models, one per width, take {size(total)} together."
