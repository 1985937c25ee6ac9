"""Linear layers in vLLM: the stored layers and shards that one layer of vLLM consists of, and their matmuls.

vLLM fuses layers that share an input (q, k and v; gate and up) and shards them for tensor parallelism. Here each stored layer
keeps its own bit-width, so that an allocation may give q, k and v different ones; those of equal bit-width share a launch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear
from vllm.model_executor.utils import set_weight_attrs

from matquant.errors import UserError
from matquant.inference.shard import WeightShard
from matquant.vllm.fused_linears import fuse
from matquant.vllm.sharded_linear import ShardedDenseLinear, ShardedLinear, ShardedNestedLinear, finish_loading

_SHARD_IDS = {"q": 0, "k": 1, "v": 2}


class NestedLinearMethod(LinearMethodBase):
    """Quantization method of one layer of vLLM.

    Args:
        names: vLLM's names of the stored layers that it consists of, in order.
        make_shard: makes the shard of a nested layer from vLLM's name of it; returns None for a layer that is not quantized.
        is_dummy: True for ``load_format=dummy``.
    """

    def __init__(
        self,
        names: Sequence[str],
        make_shard: Callable[[str, WeightShard], ShardedNestedLinear | None],
        is_dummy: bool = False,
    ) -> None:
        self.names, self.make_shard, self.is_dummy = names, make_shard, is_dummy

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
        shards = _weight_shards(layer, len(self.names), input_size_per_partition, output_partition_sizes, input_size)
        linears: list[ShardedLinear] = [
            self.make_shard(name, shard) or ShardedDenseLinear(name, shard, params_dtype)
            for name, shard in zip(self.names, shards, strict=True)
        ]
        layer.sharded_linears = nn.ModuleList(linears)
        layer.fused_linears = fuse(linears)
        for kind in sorted({kind for linear in linears for kind in linear.stored}):
            # vLLM looks up a parameter by the name of the stored tensor, and passes the tensor to its weight_loader. Planes
            # that are dropped need a placeholder too.
            placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(placeholder, {"weight_loader": _weight_loader(linears, kind)})
            layer.register_parameter(kind, placeholder)

    def process_weights_after_loading(self, layer: Any) -> None:
        finish_loading(list(layer.sharded_linears), self.is_dummy)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.fused_linears is not None:
            out: Tensor = layer.fused_linears(x, bias)
            return out
        outputs, start = [], 0
        for linear in layer.sharded_linears:
            rows = linear.shard.shape[0]
            outputs.append(linear(x, None if bias is None else bias[start : start + rows]))
            start += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _weight_loader(linears: Sequence[ShardedLinear], kind: str) -> Callable[..., None]:
    def load(_: Tensor, loaded: Tensor, shard_id: str | int | None = None) -> None:
        index = 0 if shard_id is None else _SHARD_IDS.get(shard_id) if isinstance(shard_id, str) else shard_id
        if not isinstance(index, int) or index >= len(linears) or (shard_id is None and len(linears) > 1):
            names = [linear.name for linear in linears]
            raise UserError(f"vLLM fuses {names} in a way that is not supported: shard {shard_id!r}.")
        linears[index].load(kind, loaded)

    return load


def _weight_shards(
    layer: Any, stored_layers: int, columns_held: int, rows_held: Sequence[int], in_features: int
) -> list[WeightShard]:
    """Shards of the stored layers that a layer of vLLM consists of.

    Args:
        stored_layers: number of stored layers.
        columns_held: input features on this device.
        rows_held: output features on this device, for each layer that vLLM fuses.
        in_features: input features of the whole layer.

    Raises:
        UserError: vLLM fuses another number of layers than are stored.
    """
    rank, size = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
    columns = (0, in_features)
    if columns_held != in_features:  # row-parallel: sharded by columns, and then not by rows
        columns, rank, size = (rank * columns_held, (rank + 1) * columns_held), 0, 1
    # With fewer key and value heads than devices, several devices hold the same heads.
    replicas = [getattr(layer, "num_kv_head_replicas", 1) if i else 1 for i in range(len(rows_held))]
    ranges = [(rank // r * rows, (rank // r + 1) * rows) for r, rows in zip(replicas, rows_held, strict=True)]
    totals = [rows * size // r for r, rows in zip(replicas, rows_held, strict=True)]
    if hasattr(layer, "org_vocab_size"):  # output head, whose rows vLLM pads
        totals = [layer.org_vocab_size]
    if stored_layers == len(rows_held):
        return [WeightShard(total, in_features, (held,), columns) for total, held in zip(totals, ranges, strict=True)]
    if stored_layers != 1:
        raise UserError(
            f"vLLM fuses {len(rows_held)} layers at {layer.prefix}, but the checkpoint stores {stored_layers}; this is not "
            "supported."
        )
    offsets = [sum(totals[:i]) for i in range(len(totals))]  # one stored layer that vLLM splits, as in Phi-3
    held = tuple((offset + a, offset + b) for offset, (a, b) in zip(offsets, ranges, strict=True))
    return [WeightShard(sum(totals), in_features, held, columns)]
