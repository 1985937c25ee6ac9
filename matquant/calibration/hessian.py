"""Hessians of linear layers: second moments of their inputs, one for each distinct input."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Hessian:
    """H = 2 X^T X / n over all inputs X [n, columns] that were added, in float32."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns] of any float dtype."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(flat.T, flat)
        self.tokens += len(flat)

    def value(self) -> Tensor | None:
        """float32 [columns, columns], or None when no input was seen."""
        return self.total * (2 / self.tokens) if self.tokens else None


@contextmanager
def watch(groups: Sequence[Sequence[nn.Linear]], device: torch.device | str) -> Iterator[list[Hessian]]:
    """Collect one Hessian per group of layers that share their input, from every forward pass inside the context.

    Args:
        groups: layers that receive the very same tensor.
        device: where those inputs are.
    """
    hessians, handles = [], []
    for first, *_ in groups:
        hessian = Hessian(first.in_features, device)
        handles.append(first.register_forward_pre_hook(lambda _, inputs, h=hessian: h.add(inputs[0])))
        hessians.append(hessian)
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()
