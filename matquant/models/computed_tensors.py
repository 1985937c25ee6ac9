"""Tensors that Transformers computes instead of storing them: rotary frequencies, masks, multipliers and the like."""

from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError, shorten
from matquant.models.checkpoint import Checkpoint
from matquant.models.tensor_swap import named_tensors, set_tensor


def compute_tensors(model: Any, checkpoint: Checkpoint) -> None:
    """Compute the tensors that the checkpoint does not store, on the CPU, by the initialization of Transformers.

    All modules are initialized again, since some compute the tensors of the modules inside them. Stored tensors are on
    the meta device and stay there. Two passes over different memory show which elements are not computed.

    Raises:
        UserError: the initialization leaves a tensor without values.
    """
    missing = {name: t for name, t in named_tensors(model) if t.is_meta and name not in checkpoint}
    first, second = (_initialize(model, missing, byte) for byte in (0x00, 0xFF))
    if unset := [name for name in missing if not torch.equal(bytes_of(first[name]), bytes_of(second[name]))]:
        raise UserError(
            f"{type(model).__name__} gives no values to {shorten(unset)}, which its checkpoint does not store either: "
            "they would hold whatever is in memory. This architecture is not supported with the installed transformers."
        )


def _initialize(model: Any, missing: dict[str, Tensor], byte: int) -> dict[str, Tensor]:
    """Values of the missing tensors after an initialization of the model, over memory filled with ``byte``."""
    created: dict[int, Tensor] = {}  # tied tensors stay one object
    for name, placeholder in missing.items():
        if id(placeholder) not in created:
            created[id(placeholder)] = _filled_like(placeholder, byte)
        created[id(placeholder)] = set_tensor(model, name, created[id(placeholder)])
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()
    return {name: created[id(placeholder)] for name, placeholder in missing.items()}


def _filled_like(placeholder: Tensor, byte: int) -> Tensor:
    """CPU tensor of the same shape and dtype with all bytes equal."""
    raw = torch.full((placeholder.numel() * placeholder.itemsize,), byte, dtype=torch.uint8)
    return raw.view(placeholder.dtype).view(placeholder.shape)


def bytes_of(tensor: Tensor) -> Tensor:
    """Bytes of a tensor, which compare equal for equal NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
