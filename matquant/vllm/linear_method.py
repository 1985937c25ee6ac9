"""Linear layers in vLLM: which part of which stored layers one of them holds, and their matmuls.

vLLM fuses layers that share an input (q, k and v; gate and up), and cuts them for tensor parallelism. Each stored layer stays
a part of its own here, with its own width, so that an allocation may give q, k and v different ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear
from vllm.model_executor.utils import set_weight_attrs

from matquant.errors import UserError
from matquant.inference.shard import WeightShard
from matquant.vllm.sharded_linear import Part, ShardedDenseLinear, ShardedNestedLinear, check_complete

_SHARDS = {"q": 0, "k": 1, "v": 2}


class NestedLinearMethod(LinearMethodBase):
    """The method of one layer of vLLM.

    Args:
        names: the stored layers that it is made of, in order, as vLLM names them.
        make: a nested part of a stored layer, given its name and the cut; None for a layer that is not quantized.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str, WeightShard], ShardedNestedLinear | None]) -> None:
        self.names, self.make = names, make

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        cuts = _cuts(layer, len(self.names), input_size_per_partition, output_partition_sizes, input_size)
        parts: list[Part] = []
        for name, cut in zip(self.names, cuts, strict=True):
            parts.append(self.make(name, cut) or ShardedDenseLinear(name, cut, params_dtype))
        layer.nested_parts = nn.ModuleList(parts)
        for kind in sorted({kind for part in parts for kind in part.expected} | _passed_over(parts)):
            # vLLM looks for a parameter of the stored tensor's name and hands the tensor to its loader.
            door = nn.Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(door, {"weight_loader": _loader(parts, kind)})
            layer.register_parameter(kind, door)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_complete(list(layer.nested_parts))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs, start = [], 0
        for part in layer.nested_parts:
            rows = part.cut.shape[0]
            outputs.append(part(x, None if bias is None else bias[start : start + rows]))
            start += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _passed_over(parts: Sequence[Part]) -> set[str]:
    """Stored planes that are not kept; they come all the same."""
    return {kind for part in parts if isinstance(part, ShardedNestedLinear) for kind in part.stored}


def _loader(parts: Sequence[Part], kind: str) -> Callable[..., None]:
    def load(_: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
        index = 0 if shard is None else _SHARDS.get(shard, shard) if isinstance(shard, str) else shard
        if not isinstance(index, int) or index >= len(parts) or (shard is None and len(parts) > 1):
            raise UserError(f"vLLM fuses {[p.name for p in parts]} in a way that is not known here: part {shard!r}.")
        parts[index].load(kind, loaded)

    return load


def _cuts(layer: Any, count: int, columns_held: int, rows_held: Sequence[int], in_features: int) -> list[WeightShard]:
    """What a layer of vLLM holds of each of the ``count`` stored layers that it is made of.

    Args:
        columns_held, rows_held: sizes on this device; rows for each part that vLLM knows of.
        in_features: of the whole.
    """
    rank, size = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
    columns = (0, in_features)
    if columns_held != in_features:  # cut by columns, and so not by rows
        columns, rank, size = (rank * columns_held, (rank + 1) * columns_held), 0, 1
    # Where there are fewer heads of keys and values than devices, several devices hold the same ones.
    replicas = [getattr(layer, "num_kv_head_replicas", 1) if i else 1 for i in range(len(rows_held))]
    ranges = [(rank // r * rows, (rank // r + 1) * rows) for r, rows in zip(replicas, rows_held, strict=True)]
    totals = [rows * size // r for r, rows in zip(replicas, rows_held, strict=True)]
    if hasattr(layer, "org_vocab_size"):  # an output head, whose rows are filled up
        totals = [layer.org_vocab_size]
    if count == len(rows_held):
        return [WeightShard(total, in_features, (held,), columns) for total, held in zip(totals, ranges, strict=True)]
    if count != 1:
        raise UserError(
            f"vLLM makes {len(rows_held)} parts of {count} layers at {layer.prefix}; this is not known here."
        )
    offsets = [sum(totals[:i]) for i in range(len(totals))]  # one stored layer that vLLM divides, as in Phi-3
    held = tuple((offset + a, offset + b) for offset, (a, b) in zip(offsets, ranges, strict=True))
    return [WeightShard(sum(totals), in_features, held, columns)]
