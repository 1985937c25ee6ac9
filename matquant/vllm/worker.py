"""Bit-widths of a worker: methods added by ``--worker-extension-cls matquant.vllm.worker.WidthExtension``, and those of a step.

Weights are not moved. Every new choice of bit-widths captures its own set of CUDA graphs once, see ``vllm.cuda_graphs``, which
takes about as long as at the start.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from matquant.errors import UserError
from matquant.formats.bit_choice import BitChoice, bits_by_layer
from matquant.formats.bits import MAX_BITS
from matquant.vllm.cuda_graphs import check_graph_mode, recapture_cuda_graphs, swap_cuda_graphs
from matquant.vllm.sharded_linear import ShardedNestedLinear
from matquant.vllm.step import ATTRIBUTE, StepWidth

WidthPairs = dict[str, list[int]]  # bit-widths [decoding, prefill] by name of the layer in the checkpoint


class WidthExtension:
    """Methods for the worker class of vLLM, which mixes them in; ``collective_rpc`` calls them on all workers."""

    model_runner: Any

    def set_bits(self, bits: int | str | Mapping[str, int], prefill: int | None = None) -> WidthPairs:
        """Set the bit-widths of all layers, or of some, for all steps whose requests do not name one.

        Args:
            bits: one bit-width, a bit-width by layer, or the path of an allocation file.
            prefill: bit-width of steps in which a sequence has more than one new token; None for that of decoding.

        Returns:
            New bit-widths of this worker's layers, see ``get_bits``.

        Raises:
            UserError: a layer or bit-width that is not available. Nothing has changed then.
        """
        return layer_widths(self.model_runner).choose(bits, prefill)

    def get_bits(self) -> WidthPairs:
        """Bit-widths [decoding, prefill] of this worker's layers, by name in the checkpoint."""
        return layer_widths(self.model_runner).chosen

    def get_step_state(self) -> dict[str, Any] | None:
        """State of the scheduler at the last step; None before the first, and with vLLM's own scheduler."""
        step = layer_widths(self.model_runner).step
        return None if step is None else dict(step.state)

    def keep_planes(self, bits: int) -> dict[str, int]:
        """Keep the planes of ``bits`` bits in the device's memory, and move all others to host memory.

        They come back by themselves when a step or ``set_bits`` needs them. CUDA graphs are captured again.

        Returns:
            Bytes of planes in the device's memory (``resident``) and of all planes (``total``).

        Raises:
            UserError: some layer is read at more bits now, also by a draft model. Nothing has changed then.
        """
        return layer_widths(self.model_runner).keep_planes(bits)

    def get_plane_bytes(self) -> dict[str, int]:
        """Bytes of planes, see ``keep_planes``."""
        return layer_widths(self.model_runner).plane_bytes()


class LayerWidths:
    """Bit-widths of all nested layers of one worker.

    Attributes:
        chosen: bit-widths for steps that do not have one of their own.
        step: the last step's bit-width; None if no scheduler of this project has sent one.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.layers = runner, _sharded_layers(runner.get_model())
        self.chosen = self.current()
        self.step: StepWidth | None = None
        self._applied: int | None = None

    def current(self) -> WidthPairs:
        """Bit-widths that the layers read now."""
        return {name: list(shards[0].bits) for name, shards in self.layers.items()}

    def choose(self, bits: int | str | Mapping[str, int], prefill: int | None) -> WidthPairs:
        """See ``WidthExtension.set_bits``."""
        by_layer = bits_by_layer(bits, self.layers)
        for name, value in by_layer.items():
            for shard in self.layers[name]:
                shard.check_bits(value)
                shard.check_bits(value if prefill is None else prefill)
        choice = BitChoice(bits=max(by_layer.values()), layer_bits=by_layer, prefill_bits=prefill, max_bits=MAX_BITS)
        check_graph_mode(self.runner.compilation_config.cudagraph_mode, choice)
        self.chosen = self.chosen | {name: list(choice.of(name)) for name in by_layer}
        self._apply(None)
        return self.chosen

    def begin_step(self, step: StepWidth) -> None:
        """Read the bit-widths of a step from now on. Raises UserError, and changes nothing, if the planes lack them."""
        self.step = step
        if step.bits != self._applied:
            self._apply(step.bits)

    def keep_planes(self, bits: int) -> dict[str, int]:
        """See ``WidthExtension.keep_planes``."""
        readers = draft_layers(self.runner)
        shards = [shard for group in self.layers.values() for shard in group]
        for shard in shards:
            shard.check_bits(bits)
        chosen = [pair for pairs in (self.chosen.values(), (reader.bits for reader in readers)) for pair in pairs]
        if (highest := max(value for pair in chosen for value in pair)) > bits:
            raise UserError(
                f"The planes of {bits} bits are not enough: some layers are read at {highest} bits. Set their bits first."
            )
        self._apply(None)
        changed = [shard.memory.keep(shard.format.planes_read(bits)) for shard in shards]
        if any(changed):
            recapture_cuda_graphs(self.runner)
        return self.plane_bytes()

    def plane_bytes(self) -> dict[str, int]:
        """Bytes of planes in the device's memory, and of all planes."""
        shards = [shard for group in self.layers.values() for shard in group]
        memories = {
            id(shard.memory): (shard.memory, len(shard.planes)) for shard in shards
        }.values()  # fused ones share it
        resident = sum(memory.resident * memory.plane_bytes for memory, _ in memories)
        return {"resident": resident, "total": sum(count * memory.plane_bytes for memory, count in memories)}

    def _bring_back(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Move the planes that some bit-widths need to the device's memory."""
        changed = False
        for name, pair in wanted.items():
            for shard in self.layers[name]:
                count = shard.format.planes_read(max(pair))
                changed |= shard.memory.resident < count and shard.memory.keep(count)
        if changed:
            recapture_cuda_graphs(self.runner)

    def _apply(self, bits: int | None) -> None:
        wanted = self.chosen if bits is None else {name: [bits, bits] for name in self.layers}
        self._bring_back(wanted)
        previous = self.current()
        for name, (decode, prefill) in wanted.items():
            for shard in self.layers[name]:
                shard.set_bits(decode, prefill)
        self._applied = bits
        if wanted != previous:
            swap_cuda_graphs(self.runner, _cache_key(previous), _cache_key(wanted))


def draft_layers(runner: Any) -> list[ShardedNestedLinear]:
    """Nested layers of a model runner's draft model."""
    models = [getattr(owner, "model", None) for owner in _proposers(runner)]
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    return [module for module in modules if isinstance(module, ShardedNestedLinear)]


def _proposers(runner: Any) -> list[Any]:
    """Proposer of drafts of a model runner, old or new; none without speculative decoding."""
    found = [getattr(runner, name, None) for name in ("drafter", "speculator")]
    return [proposer for proposer in found if proposer is not None]


def layer_widths(runner: Any) -> LayerWidths:
    """Bit-widths of a model runner's layers; the same object at each call. Raises UserError if it has no nested layers."""
    found: LayerWidths | None = vars(runner).get("matquant_widths")
    if found is None:
        found = runner.matquant_widths = LayerWidths(runner)
    return found


def begin_step(worker: Any, scheduler_output: Any) -> None:
    """Apply the bit-width of a step before a worker executes it. Does nothing with vLLM's own scheduler."""
    step = getattr(scheduler_output, ATTRIBUTE, None)
    if step is not None:
        layer_widths(worker.model_runner).begin_step(step)
        for proposer in _proposers(worker.model_runner):
            proposer.matquant_skips = not step.makes_drafts


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
