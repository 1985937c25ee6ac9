"""Figures of a load on a server: growth of memory, wrong bit-widths, latency by phase, and the drawing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import ROOT, load_script

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "experiments" / "benchmarks" / "load_summary.py"


@pytest.fixture(scope="module")
def summary() -> Any:
    return load_script(SCRIPT)


def request(
    arrival: float, first: float | None, end: float | None, tokens: int, error: str | None = None
) -> dict[str, Any]:
    return {"arrival": arrival, "first": first, "end": end, "tokens": tokens, "error": error}


REQUESTS = [
    request(0.5, 1.0, 3.0, 5),
    request(1.0, 1.2, 1.2, 1),
    request(9.9, 10.4, 12.0, 9),
    request(10.0, 13.0, 14.0, 2),
    request(11.0, None, None, 0, "status 500"),
    request(12.0, 12.5, None, 1),  # the client left
]
PHASES = [{"start": 0.0, "end": 10.0, "rate": 1.0}, {"start": 10.0, "end": 20.0, "rate": 4.0}]


@given(st.floats(-50, 50), st.floats(-1e3, 1e3), st.integers(4, 40))
def test_the_slope_is_that_of_the_second_half(slope, offset, count):
    module = load_script(SCRIPT)
    times = np.arange(count) * 5.0
    middle = times[-1] / 2
    values = np.where(times < middle, 1e6 * np.sin(times), offset + slope * times)
    found = module.slope_per_minute(list(zip(times, values, strict=True)))
    assert found == pytest.approx(60 * slope, abs=1e-6 + 1e-6 * abs(offset))


def test_no_slope_without_two_times(summary):
    assert np.isnan(summary.slope_per_minute([]))
    assert np.isnan(summary.slope_per_minute([(1.0, 5.0)]))
    assert np.isnan(summary.slope_per_minute([(0.0, 1.0), (9.0, 5.0)]))


def test_an_answer_is_that_of_the_nearest_bit_width(summary):
    eight = [{"a": -0.1, "b": -3.0}, {"c": -0.5, "d": -1.0}]
    three = [{"a": -0.4, "b": -2.0}, {"d": -0.6, "c": -0.9}]
    rounded = [{"a": -0.11, "b": -3.01}, {"d": -0.69, "c": -0.7}]  # the order of two nearly equal tokens changed
    assert summary.distance(eight, eight) == 0
    assert summary.distance(eight, rounded) == pytest.approx(0.31)
    assert summary.distance(eight, three) == pytest.approx(1.0)
    assert summary.nearest(rounded, {"8": eight, "3": three}) == "8"
    assert summary.nearest(three, {"8": eight, "3": three}) == "3"
    other = [{"z": -0.2, "a": -0.3}, {"c": -9.0, "d": -9.0}]
    assert summary.distance(eight, other) == pytest.approx(2.8)  # "z" against -3; what follows has another prefix
    assert summary.distance(other, eight) == summary.distance(eight, other)


def test_latencies_by_phase(summary):
    first, second = summary.summarize_phases(REQUESTS, PHASES)
    assert (first["requests"], first["errors"], first["tokens"], first["rate"]) == (3, 0, 15, 1.0)
    assert first["first_token"]["p50"] == pytest.approx(0.5)
    assert first["latency"]["p95"] == pytest.approx(np.percentile([2.5, 0.2, 2.1], 95), abs=1e-4)
    assert first["per_token"]["p50"] == pytest.approx(np.median([2.0 / 4, 1.6 / 8]), abs=1e-4)
    assert (second["requests"], second["errors"], second["latency"]["p99"]) == (3, 1, 4.0)
    (empty,) = summary.summarize_phases([], PHASES[:1])
    assert empty["latency"] == {"p50": None, "p95": None, "p99": None}


@pytest.mark.parametrize("requests", [REQUESTS, []])
def test_a_record_is_drawn(tmp_path, requests):
    state = {"server_bits": 8, "waiting": 1}
    states = [
        state | {"time": 0.5},
        state | {"time": 9.0, "server_bits": None},
        state | {"time": 15.0, "server_bits": 3},
    ]
    (tmp_path / "record.json").write_text(json.dumps({"requests": requests, "phases": PHASES, "states": states}))
    command = [sys.executable, SCRIPT, tmp_path / "record.json", tmp_path / "drawing.png"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)})
    assert (tmp_path / "drawing.png").read_bytes().startswith(b"\x89PNG")
