"""Predicts what a change of widths does to the loss, from all that was measured: Bayesian linear regression.

The loss is taken as a sum with one term for each unit and width. Before anything is measured the terms are the units' losses
alone, each as uncertain as it is large. What is uncertain of a term is in part its unit's, at any width, and in part its
width's, in any unit: among quantized neighbours a unit that takes more bits gains less than it did alone. Every
candidate that is measured against another on the same tokens tells the sum of the terms in which they differ.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from matquant.search.knapsack import Losses
from matquant.search.problem import Candidate, Problem

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
        mean = np.array([[unit[bits] for bits in problem.widths] for unit in prior], dtype=np.float64).ravel()
        size = np.maximum(np.abs(mean), 1e-6 * np.abs(mean).max() + 1e-12)
        units, widths = len(prior), len(problem.widths)
        alike = (
            _OF_UNIT**2 * np.kron(np.eye(units), np.ones((widths, widths)))
            + _OF_WIDTH**2 * np.kron(np.ones((units, units)), np.eye(widths))
            + _OWN**2 * np.eye(units * widths)
        )
        self._mean: NDArray = mean
        self._covariance: NDArray = alike * np.outer(size, size)
        self._precision = np.linalg.inv(alike) / np.outer(size, size)
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
        y = np.array(differences, dtype=np.float64)
        variance = (_OF_DIFFERENCE * y) ** 2 + (_OF_LOSS * loss) ** 2 * (_TOKENS / tokens)
        features = self._features(parent, candidates)
        scaled = features / variance[:, None]
        self._precision += scaled.T @ features
        self._weighted += scaled.T @ y
        self._fresh = False

    def predict(self, parent: Candidate, candidates: Sequence[Candidate]) -> tuple[NDArray, NDArray]:
        """Mean and standard deviation, float64 [candidates], of each one's loss minus the parent's."""
        self._update()
        features = self._features(parent, candidates)
        variance = ((features @ self._covariance) * features).sum(axis=1)
        return features @ self._mean, np.sqrt(np.maximum(variance, 0.0))

    def losses(self) -> Losses:
        """The expected terms, for the knapsack."""
        self._update()
        table = self._mean.reshape(len(self.problem.units), len(self._index))
        return [{bits: float(row[i]) for bits, i in self._index.items()} for row in table]

    def _update(self) -> None:
        if not self._fresh:
            self._covariance = np.linalg.inv(self._precision)
            self._mean = self._covariance @ self._weighted
            self._fresh = True

    def _features(self, parent: Candidate, candidates: Sequence[Candidate]) -> NDArray:
        """[candidates, units * widths]: 1 where a candidate has a width and the parent has not, -1 the other way."""
        widths = len(self._index)
        features = np.zeros((len(candidates), len(self.problem.units) * widths))
        for row, candidate in zip(features, candidates, strict=True):
            for unit, (old, new) in enumerate(zip(parent, candidate, strict=True)):
                if old != new:
                    row[unit * widths + self._index[new]] += 1
                    row[unit * widths + self._index[old]] -= 1
        return features
