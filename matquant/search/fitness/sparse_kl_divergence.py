"""KL(full || candidate) over the most likely tokens of the full-precision model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matquant.search.fitness.fitness_function import FitnessFunction, Head, SummedLoss
from matquant.search.fitness.kl_divergence import negative_entropy, summed_kl

if TYPE_CHECKING:
    from matquant.search.config import SearchConfig


class SparseKlDivergence(FitnessFunction):
    """KL(full || candidate) in nats, both renormalized over the ``top_k`` most likely tokens of the full-precision model."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    @classmethod
    def from_config(cls, config: "SearchConfig") -> "SparseKlDivergence":
        """Construct the function with ``search.top_k``."""
        return cls(config.top_k)

    def reference(self, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Log-probabilities (float32) and token ids (int32), both [batch, length, top_k] or the whole vocabulary."""
        logits = head(hidden)
        values, tokens = logits.float().topk(min(self.top_k, logits.shape[-1]), dim=-1)
        return values.log_softmax(-1), tokens.to(torch.int32)

    def summed_loss(self, ids: Tensor, reference: Sequence[Tensor], head: Head) -> SummedLoss:
        """KL over the tokens in ``reference``."""
        log_probabilities, tokens = reference[0][:, :-1], reference[1][:, :-1].long()
        probabilities = log_probabilities.exp()
        entropy = negative_entropy(probabilities, log_probabilities)
        return lambda logits: summed_kl(logits.gather(-1, tokens), probabilities, entropy)
