"""How far a candidate's logits are from the full-precision model's: sums over tokens, left on the device.

A score is a function from logits [batch, length, vocabulary] to the sum of a loss, a scalar tensor. Nothing here waits for a
result, so that a GPU always has the next candidate to work on.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Fitness = Literal["kl", "sparse_kl", "perplexity"]
Score = Callable[[Tensor], Tensor]


def likelihood_score(ids: Tensor) -> Score:
    """The negative log-likelihood of the tokens that follow, in nats.

    Args:
        ids: int64 [batch, length + 1].
    """
    following = ids[:, 1:].flatten()
    return lambda logits: cross_entropy(logits.float().flatten(0, 1), following, reduction="sum")


def kl_score(full: Tensor) -> Score:
    """KL(full || candidate) in nats.

    Args:
        full: the full model's logits, [batch, length, vocabulary].
    """
    log_probabilities = full.float().log_softmax(-1)
    expected = log_probabilities.exp()
    entropy = _entropy(expected, log_probabilities)
    return lambda logits: _kl(logits, expected, entropy)


def likeliest(full: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of the full model's likeliest tokens the logarithms of their shares, float32, and their numbers, int32.

    Both are [batch, length, count], or the whole vocabulary if that is smaller.
    """
    values, tokens = full.float().topk(min(count, full.shape[-1]), dim=-1)
    return values.log_softmax(-1), tokens.to(torch.int32)


def sparse_kl_score(log_shares: Tensor, tokens: Tensor) -> Score:
    """KL(full || candidate) over the tokens that ``likeliest`` found, in nats."""
    expected, numbers = log_shares.exp(), tokens.long()
    entropy = _entropy(expected, log_shares)
    return lambda logits: _kl(logits.gather(-1, numbers), expected, entropy)


def _entropy(probabilities: Tensor, logarithms: Tensor) -> Tensor:
    """The sum of p log p, float64."""
    return (probabilities * logarithms).sum(dtype=torch.float64)


def _kl(logits: Tensor, expected: Tensor, entropy: Tensor) -> Tensor:
    """Sum over tokens of KL(expected || softmax(logits)), float64; ``entropy`` is the sum of p log p.

    As p log p - p z + log sum exp z: one exponential and one product for each logit, where comparing two distributions
    term by term takes several. Rounding is some 1e-6 nats a token, far below the differences that a search looks for.
    """
    logits = logits.float()
    cross = torch.linalg.vecdot(expected, logits).sum(dtype=torch.float64)
    return entropy - cross + logits.logsumexp(-1).sum(dtype=torch.float64)
