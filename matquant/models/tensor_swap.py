"""Lends modules other tensors, or another forward, than their own for a while."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by their names, tied ones under each of theirs."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextmanager
def swapped_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters and buffers are these tensors; afterwards the very same ones as before.

    Args:
        tensors: by dotted name below ``module``. A tied parameter is known under several names; name them all.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            saved.append((held, leaf, held[leaf]))
            is_parameter = held is owner._parameters
            held[leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        yield
    finally:
        for held, leaf, own in reversed(saved):
            held[leaf] = own


@contextmanager
def patched_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, the modules' forwards are these."""
    saved = [module.__dict__.get("forward") for module in modules]  # an instance has one of its own seldom
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in zip(modules, saved, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
