"""CUDA graphs of plain steps in an engine that speculates, for vLLM's older model runner. Works without vLLM.

A plain step decodes one token of each request, without drafts. Full graphs of that runner hold ``1 + num_speculative_tokens``
tokens of each request, so that a plain step takes piecewise graphs, with the attention of every layer outside of them. Here the
runner gets full graphs of plain steps too, of the numbers of requests for which it has graphs without drafts.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger("vllm.matquant")

ATTRIBUTE = "matquant_plain_graphs"  # of a model runner


@dataclasses.dataclass(frozen=True, slots=True)
class PlainGraphs:
    """Full graphs of plain steps of one model runner.

    Attributes:
        padded: number of tokens of the graph for each number of tokens of a step.
        keys: vLLM's descriptors of the graphs.
    """

    padded: Sequence[int]
    keys: frozenset[Any]


def add_plain_graphs(runner: Any, full: Any) -> None:
    """Have full graphs of plain steps captured, where the runner has full graphs of decoding.

    None with sequence parallelism, which pads the tokens of a step to a multiple of the devices.

    Args:
        runner: model runner whose graphs have been chosen, but not captured.
        full: vLLM's mode of full graphs.
    """
    dispatcher, mode = runner.cudagraph_dispatcher, runner.cudagraph_dispatcher.cudagraph_mode
    vars(runner).pop(ATTRIBUTE, None)
    if runner.uniform_decode_query_len == 1 or not mode.separate_routine() or mode.decode_mode() != full:
        return
    if getattr(runner.compilation_config.pass_config, "enable_sp", False):
        return
    sizes = graph_sizes(
        runner.compilation_config.cudagraph_capture_sizes,
        runner.uniform_decode_query_len,
        runner.scheduler_config.max_num_seqs,
    )
    padded = padded_sizes(sizes)
    with _plain_decoding(runner, padded):
        keys = frozenset(
            dispatcher._create_padded_batch_descriptor(size, True, loras > 0, loras)
            for size, loras in itertools.product(sizes, dispatcher._get_lora_cases())
        )
    for key in keys:
        dispatcher.add_cudagraph_key(full, key)
    setattr(runner, ATTRIBUTE, PlainGraphs(padded, keys))
    logger.info("Full CUDA graphs of steps without drafts, up to %d requests.", sizes[-1])


def graph_sizes(capture_sizes: Sequence[int], length: int, max_requests: int) -> list[int]:
    """Numbers of requests of the graphs of plain steps, rising: the powers of 2 below ``length``, and vLLM's own sizes.

    Args:
        capture_sizes: numbers of tokens of vLLM's graphs, multiples of ``length``.
        length: tokens of a request in a step with all drafts.
        max_requests: largest number of requests of a step.
    """
    small = {1 << power for power in range(length.bit_length()) if 1 << power < length}
    return sorted(size for size in small | set(capture_sizes) if size <= max_requests)


def padded_sizes(sizes: Sequence[int]) -> list[int]:
    """Smallest size that holds each number of tokens, from none to the largest size."""
    return [0] + [next(size for size in sizes if size >= count) for count in range(1, sizes[-1] + 1)]


def step_graphs(runner: Any, tokens: int, requests: int, longest: int) -> contextlib.AbstractContextManager[None]:
    """Context in which the runner chooses the graph of a step.

    Args:
        tokens, requests: their numbers in the step.
        longest: largest number of tokens of a request.
    """
    graphs: PlainGraphs | None = getattr(runner, ATTRIBUTE, None)
    if graphs is None or longest != 1 or tokens != requests or tokens >= len(graphs.padded):
        return contextlib.nullcontext()
    return _plain_decoding(runner, graphs.padded)


def capture_graphs(runner: Any, key: Any) -> contextlib.AbstractContextManager[None]:
    """Context in which the runner captures the graph of a descriptor."""
    graphs: PlainGraphs | None = getattr(runner, ATTRIBUTE, None)
    if graphs is None or key not in graphs.keys:
        return contextlib.nullcontext()
    return _plain_decoding(runner, graphs.padded)


@contextlib.contextmanager
def _plain_decoding(runner: Any, padded: Sequence[int]) -> Iterator[None]:
    """Have the runner and its dispatcher take one token of a request for all tokens of its step."""
    dispatcher = runner.cudagraph_dispatcher
    before = runner.uniform_decode_query_len, dispatcher.uniform_decode_query_len, dispatcher._bs_to_padded_graph_size
    runner.uniform_decode_query_len = dispatcher.uniform_decode_query_len = 1
    dispatcher._bs_to_padded_graph_size = list(padded)
    try:
        yield
    finally:
        runner.uniform_decode_query_len, dispatcher.uniform_decode_query_len = before[:2]
        dispatcher._bs_to_padded_graph_size = before[2]
