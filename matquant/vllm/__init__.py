"""The vLLM plugin: serves nested checkpoints at any width, and changes the width while serving.

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. Nothing here is
imported by the rest of the package, and only this package needs vLLM.

    quantization_config.py   which layers are nested, and at which widths
    linear.py       linear layers, fused ones with a width for each part
    experts.py      experts of mixtures
    parts.py        the part of one layer's weight that a device holds (needs no vLLM)
    ops.py          the operator that reads its width when it runs (needs no vLLM)
    worker.py       changing widths in a running engine
    endpoint.py     the same over HTTP
"""

from collections.abc import Mapping
from typing import Any


def register() -> None:
    """Make the formats known to vLLM; may be called any number of times."""
    from matquant.vllm import quantization_config  # noqa: F401 - registers when imported


def set_bits(llm: Any, bits: int | str | Mapping[str, int], prefill: int | None = None) -> None:
    """Set the widths of a ``vllm.LLM`` that was made with ``worker_extension_cls="matquant.vllm.worker.WidthExtension"``.

    What was cached of earlier prompts is dropped, since it is of other widths.

    Args:
        bits, prefill: as in ``WidthExtension.set_bits``.
    """
    llm.collective_rpc("set_bits", args=(bits, prefill))
    llm.reset_prefix_cache()
