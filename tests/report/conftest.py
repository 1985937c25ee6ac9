"""Made-up results for all tests of reports."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def _slice(bits: int | str, average: float, scale: float, datasets: Sequence[str]) -> dict[str, Any]:
    kl = scale * 4.0 ** (2 - average)
    return {
        "bits": bits,
        "average_bits": average,
        "bytes": int(1_000_000 * average / 8),
        "perplexity": dict.fromkeys(datasets, 7.0 + kl),
        "kl": dict.fromkeys(datasets, kl),
        "tasks": {},
    }


def _results(
    method: str = "matgptq",
    bits: Sequence[int] = (2, 3, 4),
    scale: float = 1.0,
    datasets: Sequence[str] = ("stdlib",),
    allocation: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """The results of one job; ``changes`` replace top-level fields."""
    slices = [_slice(width, float(width), scale, datasets) for width in bits]
    slices += [_slice("allocation", 2.5, scale, datasets)] if allocation else []
    layers = [
        {"name": f"model.layers.{block}.{name}", "block": block, "parameters": 100 * (block + 1), "error": errors}
        for block in range(2)
        for name in LAYERS
        for errors in [{str(width): (block + 1) * 4.0**-width for width in bits}]
    ]
    return {
        "schema": 1,
        "model": "tiny",
        "method": method,
        "command": f"python run.py method={method}",
        "created": "2026-11-23T21:00:00+00:00",
        "config": {
            "method": {"name": method, "group_size": 128},
            "objective": {"name": "balanced"},
            "bits": list(bits),
        },
        "parent": {"path": "outputs/store/abc", "sha256": "ab" * 32, "bytes": 1_300_000, "reused": False},
        "baseline": {"bytes": 2_000_000, "perplexity": dict.fromkeys(datasets, 7.0)},
        "slices": slices,
        "seconds": {"load": 0.5, "quantize": 12.5, "evaluate": 3.25},
        "layers": layers,
        "warnings": [],
        "versions": {"torch": "2.13.0"},
    } | changes


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    return _results
