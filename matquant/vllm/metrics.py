"""Prometheus metrics of the bit-widths, in vLLM's registry: brought up to date when ``/metrics`` is read.

matquant_step_bits                     bit-width of the last step; 0 for one by layer
matquant_server_bits                   bit-width of requests that do not name one; 0 for one by layer
matquant_switches_total                changes of that bit-width by the load policy
matquant_steps_total{bits="3"}         steps by bit-width
matquant_tokens_total{bits="3"}        computed tokens, of prompts and of answers, by bit-width
"""

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge


@functools.cache
def _gauge(name: str, about: str) -> Any:
    return Gauge(f"matquant_{name}", about, multiprocess_mode="mostrecent")


@functools.cache
def _counter(name: str, about: str, *labels: str) -> Any:
    return Counter(f"matquant_{name}", about, labels)


_counted: dict[tuple[str, ...], int] = {}


def update(state: Mapping[str, Any] | None) -> None:
    """Set the metrics to a state of the scheduler, see ``scheduler.SyncWidthScheduler``; None changes nothing."""
    if state is None:
        return
    _gauge("step_bits", "Bit-width of the last step, 0 for one by layer.").set(_number(state["step_bits"]))
    _gauge("server_bits", "Bit-width of requests that do not name one, 0 for one by layer.").set(
        _number(state["server_bits"])
    )
    _raise(_counter("switches", "Changes of the server's bit-width by load."), state["switches"], "switches")
    for name, about in (("steps", "Steps by bit-width."), ("tokens", "Computed tokens by bit-width.")):
        for bits, value in state[name].items():
            _raise(_counter(name, about, "bits").labels(bits), value, name, bits)


def _number(bits: str) -> int:
    return int(bits) if bits.isdecimal() else 0


def _raise(counter: Any, value: int, *key: str) -> None:
    """Raise a counter to a value; one that restarted with the engine counts from 0 again."""
    before = _counted.get(key, 0)
    counter.inc(value - before if value >= before else value)
    _counted[key] = value
