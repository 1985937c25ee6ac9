"""Cholesky factorization of the damped inverse Hessian; raises instead of silently falling back to round-to-nearest."""

import dataclasses

import torch
from torch import Tensor

from matquant.errors import UserError

_MAX_DAMPING = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class InverseFactor:
    """Upper Cholesky factor U of the inverse damped Hessian, inverse = U^T U.

    Attributes:
        upper: float32 [columns, columns].
        damp: damping that was used, as a fraction of the Hessian's mean diagonal.
        note: sentence if that is more than was requested, else None.
    """

    upper: Tensor
    damp: float
    note: str | None


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Add ``damp`` times the mean diagonal to a Hessian; inputs that were always zero get the mean as their diagonal.

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


def inverse_factor(hessian: Tensor, damp: float, layer: str = "this layer") -> InverseFactor:
    """Factorize the inverse of the damped Hessian; if it is not positive definite, raise precision first, then damping.

    Raises:
        UserError: no damping up to the mean diagonal itself makes it positive definite, or it is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise UserError(
            f"The calibration inputs of {layer} hold NaN or Inf, so no codes can be chosen. Check the model and the "
            "calibration text."
        )
    requested = damp
    while damp <= _MAX_DAMPING:
        for dtype in (torch.float32, torch.float64):
            upper = _try_factorize(damped(hessian, damp).to(dtype))
            if upper is not None:
                note = None
                if damp > requested:
                    note = (
                        f"{layer}: the Hessian was not positive definite; damping grew from {requested:g} to {damp:g}."
                    )
                return InverseFactor(upper.float(), damp, note)
        damp *= 10
    raise UserError(f"The Hessian of {layer} is not positive definite even with damping 1. Use more calibration text.")


def _try_factorize(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    good = not info.item() and torch.isfinite(upper).all()
    return upper.contiguous() if good else None
