"""Surrogate model of the loss: Bayesian linear regression over all measurements.

The loss is modelled as a sum of terms, one per unit and bit-width. The prior mean is the loss of each unit alone. The
prior standard deviation of a term is proportional to its size. Prior covariance = per-unit + per-bit-width +
independent components. The per-bit-width component exists because a unit among quantized neighbours gains less from
additional bits than it does alone. A candidate that is compared with a parent on the same tokens is one observation:
the sum of the differences of their terms.

Computed in float64 on the CPU by torch, which respects the job's number of threads. NumPy's BLAS would use every core
for matrices of a few thousand rows, and searches on one machine would compete for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from matquant.search.allocation_problem import AllocationProblem, Candidate
from matquant.search.knapsack import UnitLosses

# Prior standard deviations, relative to the size of a term: shared by the bit-widths of a unit, shared by the units at
# a bit-width, and independent.
_UNIT_STD, _BITS_STD, _OWN_STD = 0.7, 0.5, 0.5
# Standard deviation of the error of the linear model: relative to the measured difference, and relative to the loss on
# 1024 tokens.
_DIFFERENCE_STD, _LOSS_STD, _LOSS_TOKENS = 0.2, 0.02, 1024


class Surrogate:
    """Posterior distribution (normal) of the terms.

    Args:
        problem: units and bit-widths; its limit is not used.
        prior: expected terms: loss of each unit at each bit-width.
    """

    def __init__(self, problem: AllocationProblem, prior: UnitLosses) -> None:
        self.problem = problem
        self._column = {bits: i for i, bits in enumerate(problem.bits)}
        mean = torch.tensor([[unit[bits] for bits in problem.bits] for unit in prior], dtype=torch.float64).flatten()
        scale = mean.abs().clamp(min=1e-6 * float(mean.abs().max()) + 1e-12)
        correlation = _prior_covariance(len(prior), len(problem.bits))
        self._mean = mean
        self._covariance = correlation * torch.outer(scale, scale)
        self._precision = _inverse(correlation) / torch.outer(scale, scale)
        self._weighted_mean = self._precision @ mean
        self._is_current = True  # mean and covariance include all observations

    def observe(
        self, parent: Candidate, candidates: Sequence[Candidate], differences: Sequence[float], loss: float, tokens: int
    ) -> None:
        """Update the posterior with losses that were measured on the same tokens.

        Args:
            parent: candidate that the others are compared with.
            candidates: compared candidates; the parent among them adds no information.
            differences: loss of each candidate minus the loss of the parent.
            loss: loss of the parent.
            tokens: number of tokens.
        """
        y = torch.tensor(differences, dtype=torch.float64)
        variance = (_DIFFERENCE_STD * y) ** 2 + (_LOSS_STD * loss) ** 2 * (_LOSS_TOKENS / tokens)
        features = self._features(parent, candidates)
        scaled = features / variance[:, None]
        self._precision += scaled.T @ features
        self._weighted_mean += scaled.T @ y
        self._is_current = False

    def predict(self, parent: Candidate, candidates: Sequence[Candidate]) -> tuple[Tensor, Tensor]:
        """Predict the loss of each candidate minus the loss of the parent.

        Returns:
            Mean and standard deviation, float64 [candidates].
        """
        self._update()
        features = self._features(parent, candidates)
        variance = ((features @ self._covariance) * features).sum(dim=1)
        return features @ self._mean, variance.clamp(min=0.0).sqrt()

    def unit_losses(self) -> UnitLosses:
        """Posterior mean of the terms."""
        self._update()
        table = self._mean.reshape(len(self.problem.units), len(self._column)).tolist()
        return [dict(zip(self._column, row, strict=True)) for row in table]

    def _update(self) -> None:
        if not self._is_current:
            self._covariance = _inverse(self._precision)
            self._mean = self._covariance @ self._weighted_mean
            self._is_current = True

    def _features(self, parent: Candidate, candidates: Sequence[Candidate]) -> Tensor:
        """Difference of the one-hot encodings of each candidate and the parent, float64 [candidates, units * bits]."""
        columns = torch.tensor([[self._column[bits] for bits in candidate] for candidate in (parent, *candidates)])
        encoded = one_hot(columns, len(self._column)).flatten(1).double()
        return encoded[1:] - encoded[0]


def _prior_covariance(units: int, bits: int) -> Tensor:
    """Covariance of terms of size 1, float64 [units * bits, units * bits]."""
    return (
        _UNIT_STD**2 * torch.kron(_identity(units), torch.ones(bits, bits, dtype=torch.float64))
        + _BITS_STD**2 * torch.kron(torch.ones(units, units, dtype=torch.float64), _identity(bits))
        + _OWN_STD**2 * _identity(units * bits)
    )


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
