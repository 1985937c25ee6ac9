"""Factorisations of a damped Hessian, which never give up without saying so."""

import dataclasses

import torch
from torch import Tensor

from matquant.errors import UserError

_MOST_DAMPING = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Factor:
    """Upper Cholesky factor U of the inverse damped Hessian, inverse = U^T U.

    Attributes:
        upper: float32 [columns, columns].
        damp: the damping that was needed, as a fraction of the Hessian's mean diagonal.
        note: a sentence when it took more than was asked for, else None.
    """

    upper: Tensor
    damp: float
    note: str | None


def damped(hessian: Tensor, damp: float) -> Tensor:
    """The Hessian plus ``damp`` times its mean diagonal; inputs that were always zero get a diagonal of one mean.

    Args:
        hessian: float32 [columns, columns].
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    out = hessian.clone()
    out.diagonal().add_(damp * mean)
    out.diagonal()[diagonal == 0] = mean
    return out


def inverse_factor(hessian: Tensor, damp: float, layer: str = "this layer") -> Factor:
    """Factor the inverse of the damped Hessian, raising precision first and damping then when it is not positive definite.

    Raises:
        UserError: no damping up to the mean diagonal itself makes it positive definite, or it is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise UserError(
            f"The calibration inputs of {layer} hold NaN or Inf: no codes can be chosen. Check the model and text."
        )
    asked = damp
    while damp <= _MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            upper = _try_factor(damped(hessian, damp).to(dtype))
            if upper is not None:
                note = None
                if damp > asked:
                    note = f"{layer}: the Hessian was not positive definite; damping grew from {asked:g} to {damp:g}."
                return Factor(upper.float(), damp, note)
        damp *= 10
    raise UserError(f"The Hessian of {layer} is not positive definite even with damping 1. Use more calibration text.")


def _try_factor(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    good = not info.item() and torch.isfinite(upper).all()
    return upper.contiguous() if good else None
