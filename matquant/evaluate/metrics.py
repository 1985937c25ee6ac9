"""Perplexity, accuracy and KL divergence, computed from logits. Pure functions of tensors.

Logits are taken in pieces of a few tokens: the temporaries of a softmax over a large vocabulary would otherwise be
several times the logits themselves. Log-probabilities are float32; sums over tokens are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits in one piece. Small enough for a CPU's cache to hold the temporaries, large enough to keep a GPU busy.
PIECE = {"cpu": 2**18, "other": 2**26}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means over all predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; infinite when that overflows.
        kl: mean KL(full || model), in nats a token.
        top1_agreement: fraction of tokens for which both predict the same next token.
        tokens: how many were predicted.
    """

    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int

    @property
    def is_finite(self) -> bool:
        """True if perplexity and KL are neither NaN nor infinite."""
        return math.isfinite(self.perplexity) and math.isfinite(self.kl)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over predicted tokens; those of several batches add up.

    Attributes:
        nll: negative log-likelihood of the next tokens, in nats.
        kl: KL(full || model), in nats.
        agreeing: tokens where both models have the same likeliest token.
        tokens: how many were predicted.
    """

    nll: float = 0.0
    kl: float = 0.0
    agreeing: int = 0
    tokens: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.nll + other.nll, self.kl + other.kl, self.agreeing + other.agreeing, self.tokens + other.tokens
        )

    def metrics(self) -> Metrics:
        """The means. Raises ValueError when nothing was predicted."""
        if not self.tokens:
            raise ValueError("no token was predicted: windows need at least 2 tokens")
        try:
            perplexity = math.exp(self.nll / self.tokens)
        except OverflowError:
            perplexity = math.inf
        return Metrics(perplexity, self.kl / self.tokens, self.agreeing / self.tokens, self.tokens)


def likelihood(logits: Tensor, ids: Tensor) -> Totals:
    """Sums over tokens of the next-token loss.

    Args:
        logits: [batch, length, vocabulary], any float dtype.
        ids: int64 [batch, length], on their device; tokens 1 to length - 1 of each window are predicted from those
            before them.

    Returns:
        Sums in which the model is compared with itself: ``kl`` is 0 and every token agrees.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for window, tokens in _pieces(logits):
        log_probs = logits[window, tokens].float().log_softmax(-1)
        total += _nll(log_probs, _next(ids, window, tokens))
    count = _predicted(logits)
    return Totals(total.item(), 0.0, count, count)


def compare(full: Tensor, logits: Tensor, ids: Tensor) -> Totals:
    """Sums over tokens of the next-token loss and of the KL divergence from the full-precision model.

    Args:
        full: [batch, length, vocabulary] of the full-precision model, any float dtype.
        logits: [batch, length, vocabulary] of the other model, on the same device.
        ids: int64 [batch, length], on their device.

    Returns:
        Sums over tokens 1 to length - 1 of each window, each predicted from the position before it.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=logits.device)  # nll, kl, agreeing
    for window, tokens in _pieces(logits):
        expected = full[window, tokens].float().log_softmax(-1)  # [tokens, vocabulary]
        found = logits[window, tokens].float().log_softmax(-1)
        totals[0] += _nll(found, _next(ids, window, tokens))
        totals[1] += kl_divergence(expected, found).sum(dtype=torch.float64)
        totals[2] += (expected.argmax(-1) == found.argmax(-1)).sum()
    nll, kl, agreeing = totals.tolist()
    return Totals(nll, kl, int(agreeing), _predicted(logits))


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of log-probabilities [..., vocabulary], in nats: float32 [...], never negative.

    Each term is p (e^-r - 1 + r) with r = log p - log q: their sum is that of p r, since p and q both sum to 1. But no
    term is negative, and rounding in the two normalisers, which would swamp the divergence of a good slice, cancels to
    first order.
    """
    ratio = expected - found
    p, q = expected.exp(), found.exp()
    near = torch.expm1(-ratio).add_(ratio).mul_(p)  # without cancellation for a small ratio
    far = (ratio * p).sub_(p).add_(q)  # without overflow for a large one
    terms = torch.where(ratio.abs() < 1, near, far)
    # Where p is 0, so is p r, even when r is infinite or not a number because the vocabulary is masked.
    return torch.where(p == 0, q, terms).sum(-1).clamp_min(0)


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Sum, float64, of the negative log-likelihood of int64 targets [tokens] under log_probs [tokens, vocabulary]."""
    return -log_probs.gather(-1, targets[:, None]).sum(dtype=torch.float64)


def _next(ids: Tensor, window: int, tokens: slice) -> Tensor:
    return ids[window, tokens.start + 1 : tokens.stop + 1]


def _predicted(logits: Tensor) -> int:
    return logits.shape[0] * (logits.shape[1] - 1)


def _pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """A window and some of its positions but the last, which predicts nothing known. Slices of a window are views."""
    windows, length, vocabulary = logits.shape
    step = max(1, PIECE["cpu" if logits.device.type == "cpu" else "other"] // vocabulary)
    for window in range(windows):
        for start in range(0, length - 1, step):
            yield window, slice(start, min(start + step, length - 1))
