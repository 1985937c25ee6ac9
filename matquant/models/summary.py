"""What a model is made of: which layers a runtime runs as one, and which parameters quantization leaves alone."""

import re
from collections.abc import Collection
from typing import Any

from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import named_tensors
from matquant.models.tracing import shared_input_groups


def fused_groups(blocks: BlockModel) -> list[list[str]]:
    """Layers that runtimes run as one matrix, and which therefore need one width: full names, block by block.

    These are layers of one module that receive the very same input (q, k and v; gate and up), and what all experts of a
    mixture do alike. Every other layer is a group of its own. Blocks with the same layers are grouped alike, so that a block
    has to be read and run once for each kind of block only.
    """
    known: dict[tuple[Any, ...], list[list[str]]] = {}
    found = []
    for index, path in enumerate(blocks.block_names):
        layers = blocks.linears(index)
        short = {name: name[len(path) + 1 :] for name in layers}
        kind = tuple((short[name], tuple(layer.weight.shape)) for name, layer in layers.items())
        if kind not in known:
            known[kind] = [[short[name] for name in group] for group in _fused(blocks, index)]
        found += [[f"{path}.{name}" for name in group] for group in known[kind]]
    return found


def _fused(blocks: BlockModel, index: int) -> list[list[str]]:
    pools = blocks.expert_groups(index)
    inputs = shared_input_groups(blocks, index)
    groups: dict[Any, list[str]] = {}
    for number, group in enumerate([*inputs.groups, *([name] for name in inputs.uncalled)]):
        for name in group:
            groups.setdefault(pools.get(name, (number, name.rpartition(".")[0])), []).append(name)
    return list(groups.values())


def unquantized_parameters(
    blocks: BlockModel, quantized: Collection[str], skipped: Collection[str]
) -> list[dict[str, Any]]:
    """Parameters that stay as they are, those of different blocks (or experts) together.

    Args:
        quantized: full names of layers.
        skipped: full names of layers that the settings leave out.

    Returns:
        For each: ``name`` with ``*`` for numbers, ``tensors``, ``parameters`` and ``reason``.
    """
    reasons = {f"{name}.weight": "left out by method.skip" for name in skipped}
    embedding = blocks.model.get_input_embeddings().weight
    head = getattr(blocks.model.get_output_embeddings(), "weight", None)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors(blocks.model):
        own = name.rpartition(".")[0] in quantized and name.endswith(".weight")
        if own or id(tensor) in seen or not isinstance(tensor, type(embedding)):
            continue
        seen.add(id(tensor))
        reason = "no linear layer"
        if tensor is embedding:
            reason = "embeddings" + (", tied to the head" if head is embedding else "")
        elif tensor is head:
            reason = "the head; method.quantize_lm_head=true quantizes it"
        elif tensor.ndim < 2:
            reason = "norm or bias"
        key = re.sub(r"\.\d+(?=\.)", ".*", name) if tensor.ndim > 1 else "norms and biases", reasons.get(name, reason)
        row = rows.setdefault(key, {"name": key[0], "tensors": 0, "parameters": 0, "reason": key[1]})
        row["tensors"] += 1
        row["parameters"] += tensor.numel()
    return sorted(rows.values(), key=lambda row: -row["parameters"])
