"""CUDA graphs of vLLM: a graph keeps the bit-widths of its capture, so every choice of bit-widths has a set of its own."""

from typing import Any

from matquant.errors import UserError
from matquant.formats.bit_choice import BitChoice
from matquant.vllm.compat import graph_tables


def check_graph_mode(mode: Any, choice: BitChoice) -> None:
    """Check that vLLM captures prefill and decoding separately if their bit-widths differ.

    Args:
        mode: ``cudagraph_mode`` of vLLM's compilation config, or None.

    Raises:
        UserError: prefill and decoding share graphs, but not bit-widths.
    """
    if choice.prefill_differs and mode is not None and mode.name != "NONE" and not mode.separate_routine():
        raise UserError(
            f"prefill_bits differs from bits, but with cudagraph_mode={mode.name} vLLM uses the same CUDA graphs for prefill "
            'and decoding. Start it with --compilation-config \'{"cudagraph_mode": "FULL_AND_PIECEWISE"}\' or '
            "FULL_DECODE_ONLY, or with --enforce-eager."
        )


def graph_tokens(compilation: Any) -> int:
    """Largest number of tokens of a step that vLLM captures into a CUDA graph; 0 without graphs.

    Args:
        compilation: vLLM's compilation config.
    """
    mode = compilation.cudagraph_mode
    without = mode is None or mode.name == "NONE"
    return 0 if without else max(compilation.cudagraph_capture_sizes or [0])


def swap_cuda_graphs(runner: Any, previous: tuple[Any, ...], current: tuple[Any, ...]) -> None:
    """Store the graphs of the previous bit-widths, and restore or capture those of the current ones.

    Args:
        runner: model runner of a vLLM worker.
        previous, current: hashable keys of the bit-widths of all layers.
    """
    if not _has_graphs(runner):
        return
    graph_cache = runner.__dict__.setdefault("matquant_graph_cache", {})
    tables = graph_tables(runner)
    graph_cache[previous] = [dict(table) for table in tables]
    for table, cached in zip(tables, graph_cache.get(current, [{}] * len(tables)), strict=True):
        table.clear()
        table.update(cached)
    if current not in graph_cache:
        runner.capture_model()


def recapture_cuda_graphs(runner: Any) -> None:
    """Forget all graphs, because addresses of weights have changed, and capture those of the current bit-widths."""
    if not _has_graphs(runner):
        return
    vars(runner).pop("matquant_graph_cache", None)
    for table in graph_tables(runner):
        table.clear()
    runner.capture_model()


def _has_graphs(runner: Any) -> bool:
    mode: str = runner.compilation_config.cudagraph_mode.name
    return mode != "NONE" and bool(runner.device.type == "cuda")
