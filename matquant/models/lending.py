"""Lends a module other tensors than its own for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by their names, tied ones under each of theirs."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextmanager
def substituted(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
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
