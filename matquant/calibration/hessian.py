"""Hessian accumulators: second moments of a linear layer's inputs."""

import torch
from torch import Tensor

from matquant.distributed import ProcessGroup

# Columns of a panel of X^T X. Of the symmetric matrix only the part from each panel's first column on is computed: with many
# panels that is half of it. Narrower panels would leave matrix products too small for a GPU.
PANEL_COLUMNS = 2048


class HessianAccumulator:
    """Running H = 2 X_b^T X_b / n, and for asymmetric calibration C = 2 (X - X_b)^T X_b / n.

    X_b [n, columns] are the inputs in a quantized model, X those in the full-precision model for the same tokens. Products of
    a batch are float32, sums over batches float64: so the order of batches, and the number of processes, has no effect after
        rounding to
    float32.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, asymmetric: bool = False) -> None:
        # Zero left of each panel's first column.
        self._square = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._square) if asymmetric else None
        self.tokens = 0

    def update(self, inputs: Tensor, full: Tensor | None = None) -> None:
        """Add inputs [n, columns] of any float dtype, and those of the full-precision model if asymmetric.

        If the two hold different numbers of tokens, the cross terms are dropped.
        """
        for first, last in _panels(inputs.shape[1]):
            _accumulate(self._square[first:last, first:], inputs[:, first:last], inputs[:, first:])
        self.tokens += len(inputs)
        if self._cross is not None:
            if full is None or full.shape != inputs.shape:
                self._cross = None
            else:
                _accumulate(self._cross, full.float() - inputs, inputs)

    def merge(self, other: "HessianAccumulator") -> None:
        """Add the sums of another accumulator."""
        self._square += other._square
        self.tokens += other.tokens
        self._cross = None if self._cross is None or other._cross is None else self._cross + other._cross

    def all_reduce(self, process_group: ProcessGroup) -> None:
        """Sum over all processes."""
        if process_group.world_size == 1:
            return
        counts = torch.tensor([self.tokens, int(self._cross is None)])
        process_group.all_reduce(counts)
        self.tokens = int(counts[0])
        process_group.all_reduce(self._square)
        if counts[1]:
            self._cross = None
        if self._cross is not None:
            process_group.all_reduce(self._cross)

    def pad_with(self, others: "HessianAccumulator", tokens: int) -> None:
        """Pad to ``tokens`` tokens with the average of another accumulator; drops the cross terms."""
        if self.tokens < tokens and others.tokens:
            self._square.add_(others._square, alpha=(tokens - self.tokens) / others.tokens)
            self.tokens = tokens
            self._cross = None

    @property
    def hessian(self) -> Tensor:
        """float32 [columns, columns]."""
        full = self._square.float().mul_(2 / self.tokens)
        for first, last in _panels(len(full)):
            full[last:, first:last] = full[first:last, last:].T
        return full

    @property
    def cross(self) -> Tensor | None:
        """float32 [columns, columns], or None if not asymmetric or dropped."""
        return None if self._cross is None else self._cross.float().mul_(2 / self.tokens)


def _panels(columns: int) -> list[tuple[int, int]]:
    """First and last column of each panel."""
    return [(first, min(first + PANEL_COLUMNS, columns)) for first in range(0, columns, PANEL_COLUMNS)]


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to ``total``; [n, columns] of any float dtype each, and a float64 total.

    A GPU multiplies half-precision inputs many times faster than float32 inputs without a loss: their products are exact in
    float32, in which they are summed. If only ``right`` is half precision, ``left`` is scaled into its range by a power of two
    and rounded, to a relative error of 2^-9 (bfloat16) or 2^-11 of each number.
    """
    if right.device.type != "cuda" or right.dtype == torch.float32:
        total.add_(left.float().T @ right.float())
    elif left.dtype == right.dtype:
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        exponent = torch.frexp(torch.linalg.vector_norm(left, torch.inf)).exponent - 8  # the largest becomes about 2^8
        scaled = torch.ldexp(left, -exponent).to(right.dtype)
        total.add_(torch.ldexp(torch.mm(scaled.T, right, out_dtype=torch.float32), exponent))
