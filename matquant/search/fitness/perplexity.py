"""Negative log-likelihood of the text."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy

from matquant.search.fitness.fitness_function import FitnessFunction, Head, SummedLoss


class Perplexity(FitnessFunction):
    """Negative log-likelihood in nats: the logarithm of the perplexity, which ranks candidates equally."""

    needs_reference = False

    def reference(self, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        """No tensors."""
        return ()

    def summed_loss(self, ids: Tensor, reference: Sequence[Tensor], head: Head) -> SummedLoss:
        """Cross entropy with the next tokens of ``ids``."""
        targets = ids[:, 1:].flatten()
        return lambda logits: cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
