"""Base class of the estimators of each unit's loss alone."""

import abc

from matquant.search.knapsack import UnitLosses
from matquant.search.search_run import SearchRun


class SensitivityEstimator(abc.ABC):
    """Estimator of the loss of each unit at each bit-width."""

    @abc.abstractmethod
    def estimate(self, run: SearchRun) -> UnitLosses:
        """Estimate the losses of the units of ``run.problems``.

        Raises:
            UserError: the parent lacks data that the estimator needs.
        """
