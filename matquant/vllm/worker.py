"""Changing widths in a running engine: the methods that ``--worker-extension-cls matquant.vllm.worker.WidthExtension`` adds.

Weights stay where they are. CUDA graphs keep the widths that they were captured with, so a set of graphs is kept for each
choice of widths; those of a new choice are captured when it is first made, which takes about as long as at the start.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from matquant.errors import UserError
from matquant.vllm.bit_widths import Widths, by_layer, check_graphs
from matquant.vllm.sharded_linear import ShardedNestedLinear


class WidthExtension:
    """Methods for vLLM's worker, called on all of them by ``collective_rpc``. Mixed into its class by vLLM."""

    model_runner: Any

    def set_bits(self, bits: int | str | Mapping[str, int], prefill: int | None = None) -> dict[str, list[int]]:
        """Set the width of all layers, or of some; see ``matquant.inference.set_bits``.

        Args:
            bits: a width, widths by layer, or the path of an allocation's file.
            prefill: another width for steps in which not every sequence decodes.

        Returns:
            The widths of this worker's layers now, for decoding and for all else.

        Raises:
            UserError: a layer or width that is not there; nothing has changed then.
        """
        parts = _parts(self.model_runner.get_model())
        wanted = by_layer(bits, parts, most=8)
        for name, width in wanted.items():
            for part in parts[name]:
                part.check_bits(width)
                part.check_bits(width if prefill is None else prefill)
        before = self.get_bits()
        widths = Widths(bits=max(wanted.values()), decode=wanted, prefill=prefill, max_bits=8)
        check_graphs(self.model_runner.compilation_config.cudagraph_mode, widths)
        for name, width in wanted.items():
            for part in parts[name]:
                part.set_bits(width, width if prefill is None else prefill)
        if (now := self.get_bits()) != before:
            _exchange_graphs(self.model_runner, _key(before), _key(now))
        return now

    def get_bits(self) -> dict[str, list[int]]:
        """The widths of this worker's layers, for decoding and for all else."""
        return {name: parts[0].widths[:2].tolist() for name, parts in _parts(self.model_runner.get_model()).items()}


def _parts(model: nn.Module) -> dict[str, list[ShardedNestedLinear]]:
    """The parts of each stored layer, by its name in the checkpoint."""
    found: dict[str, list[ShardedNestedLinear]] = {}
    for module in model.modules():
        if isinstance(module, ShardedNestedLinear):
            found.setdefault(module.name, []).append(module)
    if not found:
        raise UserError("This model has no nested layers whose width could be set.")
    return found


def _key(widths: Mapping[str, list[int]]) -> tuple[Any, ...]:
    return tuple((name, *pair) for name, pair in sorted(widths.items()))


def _exchange_graphs(runner: Any, before: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    """Put the graphs of ``before`` aside, and those of ``now`` in their place, captured if there are none yet."""
    if runner.compilation_config.cudagraph_mode.name == "NONE" or runner.device.type != "cuda":
        return
    shelf = runner.__dict__.setdefault("matquant_graphs", {})
    places = _graph_tables(runner)
    shelf[before] = [dict(table) for table in places]
    for table, kept in zip(places, shelf.get(now, [{}] * len(places)), strict=True):
        table.clear()
        table.update(kept)
    if now not in shelf:
        runner.capture_model()


def _graph_tables(runner: Any) -> list[dict[Any, Any]]:
    """Where vLLM keeps its captured graphs."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    wrappers = sorted(CUDAGraphWrapper._all_instances, key=id)
    tables = [wrapper.concrete_cudagraph_entries for wrapper in wrappers]
    manager = getattr(runner, "cudagraph_manager", None)  # of the second model runner
    return tables if manager is None else [*tables, manager.graphs]
