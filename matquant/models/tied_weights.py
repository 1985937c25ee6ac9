"""Tied parameters: one tensor under several names, usually that of the embeddings and of the head."""

from typing import Any

import torch
from torch import Tensor, nn

from matquant.models.checkpoint import Checkpoint
from matquant.models.tensor_swap import set_tensor

# Elements per comparison of two copies of a tied tensor, to limit the memory that is mapped at once.
_COMPARED_AT_ONCE = 2**24


def tie_equal(model: Any, checkpoint: Checkpoint) -> None:
    """Tie parameters that the config ties and the checkpoint stores twice with equal values, as Transformers does."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if (
            target in checkpoint
            and source in checkpoint
            and model.get_parameter(target) is not model.get_parameter(source)
        ):
            tensors = dict(checkpoint.read([target, source]))
            if _equal(tensors[target], tensors[source]):
                set_tensor(model, target, model.get_parameter(source))


def untie_head(model: Any) -> bool:
    """Give a head that is tied to the embeddings its own parameter, on the same storage; return True if it was tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not embedding.weight:
        return False
    name = next(n for n, m in model.named_modules() if m is head)
    set_tensor(model, f"{name}.weight", nn.Parameter(head.weight.detach(), requires_grad=False))
    getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False  # or Transformers' tie_weights() would tie the head again
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, one[0].numel()))
    return all(torch.equal(one[i : i + rows], other[i : i + rows]) for i in range(0, len(one), rows))
