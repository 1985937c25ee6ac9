"""Parameters of a model that are not quantized."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import named_tensors

OUTSIDE = "outside of the decoder blocks"


def without_numbers(name: str) -> str:
    """Full name of a module or tensor with ``*`` for the numbers of blocks and experts."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def unquantized_parameters(
    blocks: BlockModel, quantized: Collection[str], reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    """List the parameters that are not quantized; those of different blocks or experts form one row.

    Args:
        quantized: full names of the quantized layers.
        reasons: why a layer is not quantized, by full name.

    Returns:
        Rows by descending size: ``name`` with ``*`` for numbers, ``tensors``, ``parameters`` and ``reason``.
    """
    known = {f"{name}.weight": reason for name, reason in reasons.items()}
    embedding = blocks.model.get_input_embeddings().weight
    head = getattr(blocks.model.get_output_embeddings(), "weight", None)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors(blocks.model):
        is_quantized = name.rpartition(".")[0] in quantized and name.endswith(".weight")
        if is_quantized or id(tensor) in seen or not isinstance(tensor, type(embedding)):
            continue
        seen.add(id(tensor))
        reason = "not a linear layer" if name.startswith(f"{blocks.name}.") else OUTSIDE
        if tensor is embedding:
            reason = "embeddings" + (", tied to the head" if head is embedding else "")
        elif tensor is head:
            reason = "the head; method.quantize_lm_head=true quantizes it"
        elif tensor.ndim < 2:
            reason = "norm or bias"
        key = without_numbers(name) if tensor.ndim > 1 else "norms and biases", known.get(name, reason)
        row = rows.setdefault(key, {"name": key[0], "tensors": 0, "parameters": 0, "reason": key[1]})
        row["tensors"] += 1
        row["parameters"] += tensor.numel()
    return sorted(rows.values(), key=lambda row: -row["parameters"])
