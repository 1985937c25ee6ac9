"""Time of the host for one call of a nested layer, and of a dense one."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kernel_checks import activations
from kernel_timing import format_of
from torch import Tensor

from matquant.formats.nested import NestedWeight
from matquant.inference import NestedLinear, ops

OVERHEAD_TOKENS = (1, 32)


def call_overhead() -> dict[str, dict[str, float]]:
    """Microseconds of the host for one call outside graphs, at 4 bits of 1024x1024, by number of tokens and kind of call."""
    dense = torch.randn(1024, 1024, device="cuda").half()
    layer = NestedLinear.from_planes(
        NestedWeight(
            codes=torch.randint(0, 256, (1024, 1024), dtype=torch.uint8, device="cuda"),
            scales=torch.rand(1024, 8, device="cuda").half(),
            zeros=None,
            format=format_of(128, stretch=1.0),
        ),
        bits=4,
    )
    packed = layer.nested_planes()
    tensors, sizes = (packed.planes, packed.scales, None, None), (4, 1024, 1024, *packed.format.op_args)
    found = {}
    for tokens in OVERHEAD_TOKENS:
        x = activations(tokens, 1024, torch.float16)
        calls: dict[str, Callable[[], Tensor]] = {
            "NestedLinear": functools.partial(layer, x),
            "ops.linear": functools.partial(ops.linear, x, packed, 4),
            "nested_linear": functools.partial(torch.ops.matquant.nested_linear.default, x, *tensors, *sizes),
            "F.linear": functools.partial(torch.nn.functional.linear, x, dense),
        }
        found[str(tokens)] = {name: host_time(call) for name, call in calls.items()}
    return found


def print_overhead(overhead: dict[str, dict[str, float]]) -> None:
    for tokens, times in overhead.items():
        listed = ", ".join(f"{us:.1f} µs ({name})" for name, us in times.items())
        print(f"tokens: {tokens}. A call takes the host {listed}", flush=True)


def host_time(call: Callable[[], Any]) -> float:
    """Microseconds of the host for one call: the median of 20 rounds."""
    rounds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):  # fewer than the driver lets wait in line
            call()
        rounds.append((time.perf_counter() - start) / 200 * 1e6)
    return statistics.median(rounds)
