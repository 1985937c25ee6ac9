"""Figures of a load on a server: latency by phase, growth of memory, distance of two answers, and a drawing of a record.

    python experiments/benchmarks/load_summary.py RECORD.json DRAWING.png

The command draws a record of ``serve_mixed_load.py``.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)
BIN_SECONDS = 2.0  # of the drawing
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}  # place of a legend

Answer = Sequence[
    Mapping[str, float]
]  # log-probabilities of the likeliest tokens at each position, the chosen one first


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Slope of the second half of samples (seconds, value) by least squares, in value per minute; NaN for fewer than two."""
    if not samples:
        return math.nan
    middle = (samples[0][0] + samples[-1][0]) / 2
    late = np.array([sample for sample in samples if sample[0] >= middle])
    if len({seconds for seconds, _ in late}) < 2:
        return math.nan
    return float(60 * np.polyfit(late[:, 0] - late[0, 0], late[:, 1], 1)[0])


def distance(first: Answer, second: Answer) -> float:
    """Largest difference of log-probabilities of two greedy answers, up to the first position at which their tokens differ.

    A token that only one of them lists counts with the least log-probability that the other one lists.
    """
    largest = 0.0
    for one, other in zip(first, second, strict=False):
        lowest = min(one.values()), min(other.values())
        for token in one.keys() | other.keys():
            largest = max(largest, abs(one.get(token, lowest[0]) - other.get(token, lowest[1])))
        if next(iter(one)) != next(iter(other)):
            break
    return largest


def nearest(answer: Answer, references: Mapping[str, Answer]) -> str:
    """Name of the reference with the least distance to an answer, the first of several."""
    return min(references, key=lambda name: distance(answer, references[name]))


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Percentiles of values, None without a value."""
    return {f"p{q}": round(float(np.percentile(values, q)), 4) if values else None for q in PERCENTILES}


def summarize_phases(
    requests: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Numbers and latencies of the requests that arrived in each phase.

    Args:
        requests: each with ``arrival``, ``first`` and ``end`` (seconds from the start; None if it did not come so far),
            ``tokens`` and ``error``.
        phases: each with ``start``, ``end`` and ``rate``.

    Returns:
        For each phase its requests, errors, output tokens, and percentiles in seconds of the time to the first token, of the
        time to the end, and of the time per token after the first.
    """
    rows = []
    for phase in phases:
        arrived = [request for request in requests if phase["start"] <= request["arrival"] < phase["end"]]
        done = [request for request in arrived if request["error"] is None and request["end"] is not None]
        several = [request for request in done if request["tokens"] > 1]
        rows.append(
            {
                **phase,
                "requests": len(arrived),
                "errors": sum(request["error"] is not None for request in arrived),
                "tokens": sum(request["tokens"] for request in arrived),
                "first_token": percentiles([request["first"] - request["arrival"] for request in done]),
                "latency": percentiles([request["end"] - request["arrival"] for request in done]),
                "per_token": percentiles([(r["end"] - r["first"]) / (r["tokens"] - 1) for r in several]),
            }
        )
    return rows


def draw(record: Mapping[str, Any]) -> Any:
    """Draw requests a second, bit-width and queue, and latency over time."""
    from matplotlib.figure import Figure

    from matquant.report.drawing import styled

    with styled():
        figure = Figure(figsize=(8, 7), layout="constrained")
        rate, width, latency = figure.subplots(3, 1, sharex=True)
        _draw_rate(rate, record)
        _draw_width(width, record["states"])
        _draw_latency(latency, record["requests"])
        latency.set_xlabel("seconds")
    return figure


def _draw_rate(axes: Any, record: Mapping[str, Any]) -> None:
    from matquant.report.drawing import MUTED, SERIES

    arrivals = [request["arrival"] for request in record["requests"]]
    ends = [request["end"] for request in record["requests"] if request["error"] is None and request["end"] is not None]
    edges = _edges([*arrivals, *ends])
    for values, name, colour in ((arrivals, "arrived", SERIES[0]), (ends, "answered", SERIES[2])):
        counts = np.histogram(values, edges)[0] / BIN_SECONDS
        axes.stairs(counts, edges, label=name, color=colour)
    phases = [phase for phase in record["phases"] if phase["rate"] is not None]
    if phases:
        rates = [phase["rate"] for phase in phases]
        axes.stairs(
            rates, [phases[0]["start"], *(phase["end"] for phase in phases)], color=MUTED, ls=":", label="set rate"
        )
    axes.set_ylabel("requests a second")
    axes.legend(**_ABOVE, ncols=3)


def _draw_width(axes: Any, states: Sequence[Mapping[str, Any]]) -> None:
    from matquant.report.drawing import MUTED, SERIES

    known = [state for state in states if state["server_bits"] is not None]
    axes.step(
        [s["time"] for s in known], [s["server_bits"] for s in known], where="post", color=SERIES[1], label="bits"
    )
    axes.set_ylabel("bits of the server")
    axes.set_ylim(0, 9)
    queue = axes.twinx()
    queue.plot([s["time"] for s in states], [s["waiting"] for s in states], color=MUTED, lw=1, label="waiting")
    queue.set_ylabel("waiting requests")
    queue.grid(visible=False)
    axes.legend(handles=[*axes.lines, *queue.lines], **_ABOVE, ncols=2)


def _draw_latency(axes: Any, requests: Sequence[Mapping[str, Any]]) -> None:
    from matquant.report.drawing import SERIES, log_ticks

    done = [request for request in requests if request["error"] is None and request["end"] is not None]
    edges = _edges([request["arrival"] for request in done])
    for key, name, colour in (("first", "first token", SERIES[0]), ("end", "whole answer", SERIES[3])):
        for q, style in ((50, "-"), (95, "--")):
            points = []
            for low, high in itertools.pairwise(edges):
                values = [r[key] - r["arrival"] for r in done if low <= r["arrival"] < high]
                points += [((low + high) / 2, np.percentile(values, q))] if values else []
            axes.plot(*zip(*points, strict=True) if points else ((), ()), style, color=colour, label=f"{name}, p{q}")
    axes.set_ylabel("seconds from arrival")
    axes.set_yscale("log")
    if values := [r[key] - r["arrival"] for r in done for key in ("first", "end")]:
        log_ticks(axes.yaxis, max(min(values), 1e-4), max(*values, 2 * min(values)))
    axes.legend(**_ABOVE, ncols=4)


def _edges(times: Sequence[float]) -> np.ndarray:
    return np.arange(0, max(times, default=0) + 2 * BIN_SECONDS, BIN_SECONDS)


def main() -> None:
    """Draw the record of the command line."""
    from matquant.report.drawing import to_png

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("drawing", type=Path)
    arguments = parser.parse_args()
    arguments.drawing.write_bytes(to_png(draw(json.loads(arguments.record.read_text()))))


if __name__ == "__main__":
    main()
