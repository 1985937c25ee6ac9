"""KL(full || candidate) over the whole vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matquant.search.fitness.fitness_function import FitnessFunction, Head, SummedLoss


class KlDivergence(FitnessFunction):
    """KL(full || candidate) in nats.

    The reference is the output of the last block: exact, and its size does not depend on the vocabulary. The logits are
    recomputed from it.
    """

    def reference(self, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Output of the last block."""
        return (hidden,)

    def summed_loss(self, ids: Tensor, reference: Sequence[Tensor], head: Head) -> SummedLoss:
        """KL against the logits of ``reference``."""
        log_probabilities = head(reference[0])[:, :-1].float().log_softmax(-1)
        probabilities = log_probabilities.exp()
        entropy = negative_entropy(probabilities, log_probabilities)
        return lambda logits: summed_kl(logits, probabilities, entropy)


def negative_entropy(probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """Sum of p log p, float64, 0-dim."""
    return (probabilities * log_probabilities).sum(dtype=torch.float64)


def summed_kl(logits: Tensor, probabilities: Tensor, negative_entropy: Tensor) -> Tensor:
    """Sum over tokens of KL(probabilities || softmax(logits)), float64, 0-dim.

    Computed as sum(p log p) - sum(p z) + logsumexp(z): one exponential and one product per logit. A comparison of two
    distributions term by term takes several. The rounding error is about 1e-6 nats per token, far below the differences
    between candidates.

    Args:
        logits: z, [batch, length, vocabulary].
        probabilities: p, of the same shape.
        negative_entropy: sum of p log p.
    """
    logits = logits.float()
    cross: Tensor = torch.linalg.vecdot(probabilities, logits).sum(dtype=torch.float64)
    return negative_entropy - cross + logits.logsumexp(-1).sum(dtype=torch.float64)
