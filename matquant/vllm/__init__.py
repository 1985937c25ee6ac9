"""vLLM plugin: serves packed checkpoints at any bit-width, which may change while serving.

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. No other package
imports this one, and only this one needs vLLM.

    quantization_config.py   nested layers of a checkpoint and their bit-widths
    linear_method.py         linear layers; a fused layer has a bit-width per stored layer
    experts_method.py        experts of mixtures
    sharded_linear.py        shard of one stored layer on one device (works without vLLM)
    vllm_ops.py              matmul that reads its bit-width at run time (works without vLLM)
    cuda_graphs.py           a set of CUDA graphs per choice of bit-widths
    plain_graphs.py          CUDA graphs of steps without drafts (works without vLLM)
    worker.py                bit-widths of a running engine's layers
    scheduler.py             steps of one bit-width each, by request and by load
    width_policy.py          bit-width by load, and turns of bit-widths (works without vLLM)
    width_settings.py        settings of these (works without vLLM)
    step_drafts.py           steps with and without drafts of speculative decoding (works without vLLM)
    draft_policy.py          drafts where they are measured to be faster (works without vLLM)
    block_keys.py            keys of cached KV blocks by bit-width (works without vLLM)
    step.py                  bit-width of a step, from scheduler to workers (works without vLLM)
    plane_memory.py          planes in host memory (works without vLLM)
    endpoint.py              bit-widths over HTTP
    prometheus.py            Prometheus metrics
    compat.py                differences between releases of vLLM
"""

from collections.abc import Mapping
from typing import Any


def register() -> None:
    """Register the quantization methods with vLLM. Idempotent.

    With a release that the plugin does not work with, only the loading of a checkpoint of matquant raises UserError.
    """
    try:
        from matquant.vllm import quantization_config  # noqa: F401 - registers when imported
    except ImportError as error:
        import vllm

        from matquant.formats import matgptq, packed
        from matquant.vllm.compat import register_refusal

        register_refusal(vllm.__version__, (packed.QUANT_METHOD, matgptq.QUANT_METHOD), error)


def set_bits(llm: Any, bits: int | str | Mapping[str, int], prefill: int | None = None) -> None:
    """Set the bit-widths of a ``vllm.LLM`` that has ``worker_extension_cls="matquant.vllm.worker.WidthExtension"``.

    Drops the prefix cache, which was computed at the previous bit-widths.

    Args:
        bits, prefill: see ``WidthExtension.set_bits``.
    """
    llm.collective_rpc("set_bits", args=(bits, prefill))
    llm.reset_prefix_cache()
