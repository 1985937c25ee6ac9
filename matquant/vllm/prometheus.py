"""Prometheus metrics of the bit-widths, in vLLM's registry: brought up to date when ``/metrics`` is read.

matquant_step_bits                     bit-width of the last step; 0 for one by layer
matquant_server_bits                   bit-width of requests that do not name one; 0 for one by layer
matquant_switches_total                changes of that bit-width by the load policy
matquant_steps_total{bits="3"}         steps by bit-width
matquant_tokens_total{bits="3"}        computed tokens, of prompts and of answers, by bit-width

With speculative decoding that is adaptive, by bit-width and range of batch sizes:

matquant_drafting{bits="8", requests="5-8"}                                  1 if steps have drafts, else 0
matquant_measured_tokens_per_second{bits="8", requests="5-8", kind="plain"}  speed of the last steps, "plain" or with "drafts"
matquant_drafting_changes_total                                              decisions that changed
"""

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge


@functools.cache
def _gauge(name: str, about: str, *labels: str) -> Any:
    return Gauge(f"matquant_{name}", about, labels, multiprocess_mode="mostrecent")


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
    if (state.get("speculation") or {}).get("mode") == "adaptive":
        _update_speculation(state["speculation"])


def _update_speculation(state: Mapping[str, Any]) -> None:
    """Set the metrics of drafts, see ``draft_policy.DraftPolicy.to_json``."""
    _raise(_counter("drafting_changes", "Decisions about drafts that changed."), state["changes"], "drafting_changes")
    drafting = _gauge("drafting", "1 if steps have drafts, else 0.", "bits", "requests")
    measured = _gauge(
        "measured_tokens_per_second", "Speed of the last steps with drafts or plain.", "bits", "requests", "kind"
    )
    for found in state["ranges"]:
        labels = (found["bits"], "-".join(map(str, found["requests"])))
        drafting.labels(*labels).set(int(found["drafts"]))
        for kind, speed in found["tokens_per_second"].items():
            if speed is not None:
                measured.labels(*labels, kind).set(speed)


def _number(bits: str) -> int:
    return int(bits) if bits.isdecimal() else 0


def _raise(counter: Any, value: int, *key: str) -> None:
    """Raise a counter to a value; one that restarted with the engine counts from 0 again."""
    before = _counted.get(key, 0)
    counter.inc(value - before if value >= before else value)
    _counted[key] = value
