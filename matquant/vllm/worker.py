"""Change of bit-widths in a running engine: methods added by ``--worker-extension-cls matquant.vllm.worker.WidthExtension``.

Weights are not moved. Every new choice of bit-widths captures its own set of CUDA graphs once, see ``vllm.cuda_graphs``, which
takes about as long as at the start.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from matquant.errors import UserError
from matquant.formats.bit_choice import BitChoice, bits_by_layer
from matquant.formats.bits import MAX_BITS
from matquant.vllm.cuda_graphs import check_graph_mode, swap_cuda_graphs
from matquant.vllm.sharded_linear import ShardedNestedLinear


class WidthExtension:
    """Methods for the worker class of vLLM, which mixes them in; ``collective_rpc`` calls them on all workers."""

    model_runner: Any

    def set_bits(self, bits: int | str | Mapping[str, int], prefill: int | None = None) -> dict[str, list[int]]:
        """Set the bit-widths of all layers, or of some.

        Args:
            bits: one bit-width, a bit-width by layer, or the path of an allocation file.
            prefill: bit-width of steps in which a sequence has more than one new token; None for that of decoding.

        Returns:
            New bit-widths of this worker's layers, see ``get_bits``.

        Raises:
            UserError: a layer or bit-width that is not available. Nothing has changed then.
        """
        layers = _sharded_layers(self.model_runner.get_model())
        by_layer = bits_by_layer(bits, layers)
        for name, value in by_layer.items():
            for shard in layers[name]:
                shard.check_bits(value)
                shard.check_bits(value if prefill is None else prefill)
        choice = BitChoice(bits=max(by_layer.values()), layer_bits=by_layer, prefill_bits=prefill, max_bits=MAX_BITS)
        check_graph_mode(self.model_runner.compilation_config.cudagraph_mode, choice)
        previous = self.get_bits()
        for name in by_layer:
            for shard in layers[name]:
                shard.set_bits(*choice.of(name))
        if (current := self.get_bits()) != previous:
            swap_cuda_graphs(self.model_runner, _cache_key(previous), _cache_key(current))
        return current

    def get_bits(self) -> dict[str, list[int]]:
        """Bit-widths [decoding, prefill] of this worker's layers, by name in the checkpoint."""
        layers = _sharded_layers(self.model_runner.get_model())
        return {name: list(shards[0].bits) for name, shards in layers.items()}


def _sharded_layers(model: nn.Module) -> dict[str, list[ShardedNestedLinear]]:
    """Shards of each stored layer, by its name in the checkpoint. Raises UserError if there are none."""
    found: dict[str, list[ShardedNestedLinear]] = {}
    for module in model.modules():
        if isinstance(module, ShardedNestedLinear):
            found.setdefault(module.name, []).append(module)
    if not found:
        raise UserError("The model has no nested layers whose bits could be set. Serve a folder that matquant packed.")
    return found


def _cache_key(bits: Mapping[str, list[int]]) -> tuple[Any, ...]:
    return tuple((name, *pair) for name, pair in sorted(bits.items()))
