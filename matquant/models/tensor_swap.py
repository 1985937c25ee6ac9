"""Temporary replacement of a module's tensors, or of its forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers by name; a tied tensor under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensor_slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Dict that holds a parameter or buffer of ``module``, and its key there. Raises KeyError if there is none."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    for slots in (owner._parameters, owner._buffers):
        if key in slots:
            return slots, key
    raise KeyError(f"{type(module).__name__} has no parameter or buffer {name}")


def set_tensor(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Replace a parameter or buffer for good, a plain tensor in a parameter's place by a parameter; return it."""
    slots, key = tensor_slot(module, name)
    if isinstance(slots[key], nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    slots[key] = value
    return value


@contextmanager
def swapped_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the named parameters and buffers inside the context; restore the original objects afterwards.

    A parameter is used as it is, and so is a tensor that requires a gradient, as in ``torch.func.functional_call``, so
    that its autograd graph reaches the module's output. Any other becomes a parameter in the place of one, since
    Transformers expects parameters.

    Args:
        tensors: by dotted name below ``module``. A tied parameter has several names; give all of them.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    parameters: dict[int, nn.Parameter] = {}  # tied tensors stay one object
    try:
        for name, tensor in tensors.items():
            slots, key = tensor_slot(module, name)
            saved.append((slots, key, slots[key]))
            plain = not tensor.requires_grad and not isinstance(tensor, nn.Parameter)
            if isinstance(slots[key], nn.Parameter) and plain:
                tensor = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            slots[key] = tensor
        yield
    finally:
        for slots, key, original in reversed(saved):
            slots[key] = original


@contextmanager
def patched_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of each module inside the context."""
    saved = [module.__dict__.get("forward") for module in modules]  # None: the class's forward
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in zip(modules, saved, strict=True):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
