"""Second moments of a linear layer's inputs."""

import torch
from torch import Tensor


class Moments:
    """Running H = 2 X_b^T X_b / n, and for asymmetric calibration C = 2 (X - X_b)^T X_b / n, in float32.

    X_b [n, columns] are the inputs that a quantized model gives, X those of the full-precision model for the same tokens.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, asymmetric: bool = False) -> None:
        self._square = torch.zeros(columns, columns, device=device)
        self._cross = torch.zeros_like(self._square) if asymmetric else None
        self.tokens = 0

    def add(self, inputs: Tensor, full: Tensor | None = None) -> None:
        """Add inputs [n, columns] of any float dtype, and those of the full-precision model when asymmetric.

        Where the two do not hold the same tokens (experts, whose router decided otherwise) the cross moments are given up.
        """
        inputs = inputs.float()
        self._square.addmm_(inputs.T, inputs)
        self.tokens += len(inputs)
        if self._cross is not None:
            if full is None or full.shape != inputs.shape:
                self._cross = None
            else:
                self._cross.addmm_((full.float() - inputs).T, inputs)

    @property
    def hessian(self) -> Tensor:
        """float32 [columns, columns]."""
        return self._square * (2 / self.tokens)

    @property
    def cross(self) -> Tensor | None:
        """float32 [columns, columns], or None when not asymmetric or given up."""
        return None if self._cross is None else self._cross * (2 / self.tokens)
