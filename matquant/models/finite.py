"""Detection of NaN and infinities in weights and activations, in one pass over a tensor and without temporaries."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError, shorten


def is_finite(*tensors: Tensor) -> bool:
    """Return True if no tensor holds NaN or an infinity; tensors of any shapes and dtypes on one device."""
    extremes = [
        torch.stack(tensor.aminmax()).float() for tensor in tensors if tensor.is_floating_point() and tensor.numel()
    ]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())  # one synchronization for all tensors


def has_valid_logits(logits: Tensor) -> bool:
    """Return True if logits hold neither NaN nor +Inf; -Inf masks tokens, and is allowed."""
    return bool(torch.isfinite(logits.amax().clamp_min(0)))


@contextmanager
def checked_logits(model: nn.Module, name: str) -> Iterator[None]:
    """Check the logits of every forward pass of a causal language model inside the context.

    Args:
        name: of the model in the sentence.

    Raises:
        UserError: logits hold NaN or +Inf.
    """

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        if not has_valid_logits(output.logits):
            raise UserError(non_finite_activations(f"The logits of {name}", output.logits.dtype))

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_weights(module: nn.Module, path: str = "", exclude: Iterable[str] = ()) -> dict[str, float]:
    """Check that the parameters and stored buffers of a module are finite.

    Tensors that are computed when the model is built, such as masks, are not checked, nor are those on the meta device.

    Args:
        module: its tensors are on a device.
        path: full name of the module.
        exclude: prefixes of tensor names below the module that are not checked.

    Returns:
        Largest absolute value of each floating-point tensor, by full name.

    Raises:
        UserError: names the damaged tensors.
    """
    prefixes = tuple(exclude)
    largest: dict[str, float] = {}
    damaged: dict[int, str] = {}  # tied tensors under their first name
    for name, tensor in module.state_dict(keep_vars=True).items():
        if _is_checked(tensor) and not name.startswith(prefixes):
            full = f"{path}.{name}" if path else name
            low, high = (float(extreme) for extreme in tensor.detach().aminmax())
            largest[full] = max(-low, high)
            if not math.isfinite(largest[full]):
                damaged.setdefault(id(tensor), full)
    if damaged:
        raise UserError(non_finite_weights(shorten(list(damaged.values()))))
    return largest


def _is_checked(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def non_finite_weights(names: str) -> str:
    """Sentence on weights that hold NaN or Inf."""
    return (
        f"The weights {names} hold NaN or Inf. Copy or download the checkpoint again; if model.dtype converts it to "
        "float16, choose bfloat16."
    )


def non_finite_activations(what: str, dtype: torch.dtype) -> str:
    """Sentence on activations that hold NaN or Inf although all weights are finite."""
    advice = "Set model.dtype=bfloat16" if dtype == torch.float16 else "Check the checkpoint and its config.json"
    return (
        f"{what} hold NaN or Inf in {str(dtype).removeprefix('torch.')}, although all weights are finite: they overflow. "
        f"{advice}."
    )
