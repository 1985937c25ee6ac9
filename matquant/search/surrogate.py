"""Predicts what a change of widths does to the loss, from all that was measured: Bayesian linear regression.

The loss is taken as a sum with one term for each unit and width. Before anything is measured the terms are the units' losses
alone, each as uncertain as it is large. What is uncertain of a term is in part its unit's, at any width, and in part its
width's, in any unit: among quantized neighbours a unit that takes more bits gains less than it did alone. Every
candidate that is measured against another on the same tokens tells the sum of the terms in which they differ.

In float64 on the CPU, by torch, whose number of threads a run sets: NumPy's library would take every core for matrices that are
no larger than a few thousand terms, and searches side by side would wait for each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from matquant.search.allocation_problem import Candidate, Problem
from matquant.search.knapsack import Losses

# Standard deviations of a term, in shares of its size: what all widths of a unit have in common, what all units have in common
# at a width, and what is its own.
_OF_UNIT, _OF_WIDTH, _OWN = 0.7, 0.5, 0.5
# Standard deviation of what a linear model misses: of the measured difference, and of the loss on a thousand tokens.
_OF_DIFFERENCE, _OF_LOSS, _TOKENS = 0.2, 0.02, 1024


class Surrogate:
    """The terms' posterior, a normal distribution.

    Args:
        problem: units and widths; the budget is not looked at.
        prior: the expected terms, such as the units' losses alone.
    """

    def __init__(self, problem: Problem, prior: Losses) -> None:
        self.problem = problem
        self._index = {bits: i for i, bits in enumerate(problem.widths)}
        mean = torch.tensor([[unit[bits] for bits in problem.widths] for unit in prior], dtype=torch.float64).flatten()
        size = mean.abs().clamp(min=1e-6 * float(mean.abs().max()) + 1e-12)
        units, widths = len(prior), len(problem.widths)
        alike = (
            _OF_UNIT**2 * torch.kron(_identity(units), torch.ones(widths, widths, dtype=torch.float64))
            + _OF_WIDTH**2 * torch.kron(torch.ones(units, units, dtype=torch.float64), _identity(widths))
            + _OWN**2 * _identity(units * widths)
        )
        self._mean = mean
        self._covariance = alike * torch.outer(size, size)
        self._precision = _inverse(alike) / torch.outer(size, size)
        self._weighted = self._precision @ mean
        self._fresh = True

    def observe(
        self, parent: Candidate, candidates: Sequence[Candidate], differences: Sequence[float], loss: float, tokens: int
    ) -> None:
        """Learn from losses measured on the same tokens.

        Args:
            parent: what the candidates were compared with.
            candidates: some of them may be the parent; it tells nothing.
            differences: each candidate's loss minus the parent's.
            loss: the parent's.
            tokens: that all were measured on.
        """
        y = torch.tensor(differences, dtype=torch.float64)
        variance = (_OF_DIFFERENCE * y) ** 2 + (_OF_LOSS * loss) ** 2 * (_TOKENS / tokens)
        features = self._features(parent, candidates)
        scaled = features / variance[:, None]
        self._precision += scaled.T @ features
        self._weighted += scaled.T @ y
        self._fresh = False

    def predict(self, parent: Candidate, candidates: Sequence[Candidate]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 [candidates], of each one's loss minus the parent's."""
        self._update()
        features = self._features(parent, candidates)
        variance = ((features @ self._covariance) * features).sum(dim=1)
        return features @ self._mean, variance.clamp(min=0.0).sqrt()

    def losses(self) -> Losses:
        """The expected terms, for the knapsack."""
        self._update()
        table = self._mean.reshape(len(self.problem.units), len(self._index)).tolist()
        return [dict(zip(self._index, row, strict=True)) for row in table]

    def _update(self) -> None:
        if not self._fresh:
            self._covariance = _inverse(self._precision)
            self._mean = self._covariance @ self._weighted
            self._fresh = True

    def _features(self, parent: Candidate, candidates: Sequence[Candidate]) -> Tensor:
        """Float64 [candidates, units * widths]: 1 where a candidate has a width and the parent has not, -1 the other way."""
        positions = torch.tensor([[self._index[bits] for bits in candidate] for candidate in (parent, *candidates)])
        chosen = one_hot(positions, len(self._index)).flatten(1).double()
        return chosen[1:] - chosen[0]


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _inverse(matrix: Tensor) -> Tensor:
    """Of a symmetric positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
