import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from matquant.evaluate import metrics
from matquant.evaluate.metrics import Metrics, Totals, compare, kl_divergence, likelihood


def logits_of(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def ids_of(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(9))


def reference(full: Tensor, logits: Tensor, ids: Tensor) -> tuple[float, float, int]:
    """The definitions, in float64 and in one piece."""
    full, logits = full[:, :-1].double(), logits[:, :-1].double()
    nll = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    kl = kl_div(logits.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="sum")
    return nll.item(), kl.item(), int((full.argmax(-1) == logits.argmax(-1)).sum())


@pytest.mark.parametrize("piece", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype) -> None:
    monkeypatch.setitem(metrics.PIECE, "cpu", piece)
    full, logits = logits_of((3, 7, 50)).to(dtype), logits_of((3, 7, 50), seed=1).to(dtype)
    ids = ids_of(3, 7, 50)
    nll, kl, agreeing = reference(full, logits, ids)
    found = compare(full, logits, ids)
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert (found.agreeing, found.tokens) == (agreeing, 18)
    alone = likelihood(logits, ids)
    assert (alone.nll, alone.kl, alone.agreeing, alone.tokens) == (found.nll, 0.0, 18, 18)


@given(st.integers(0, 1000), st.sampled_from([2, 17, 3000]), st.floats(1e-7, 10), st.floats(0.01, 40))
@settings(max_examples=80, deadline=None)
def test_the_divergence_is_never_negative_and_accurate(seed: int, size: int, noise: float, scale: float) -> None:
    full = logits_of((4, size), seed, scale)
    logits = full + logits_of((4, size), seed + 1, noise)
    found = kl_divergence(full.log_softmax(-1), logits.log_softmax(-1))
    exact = kl_div(
        logits.double().log_softmax(-1), full.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert (found >= 0).all()
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-8)


def test_identical_logits_do_not_diverge() -> None:
    full, ids = logits_of((2, 5, 30)), ids_of(2, 5, 30)
    found = compare(full, full.clone(), ids)
    assert (found.kl, found.agreeing) == (0.0, found.tokens)


def test_a_masked_vocabulary() -> None:
    full, logits = logits_of((1, 4, 10)), logits_of((1, 4, 10), 1)
    full[..., 7:] = -math.inf
    logits[..., 7:] = -math.inf
    ids = ids_of(1, 4, 7)
    expected = compare(full[..., :7], logits[..., :7], ids)
    assert compare(full, logits, ids).kl == pytest.approx(expected.kl, rel=1e-6)
    # What the full model excludes and the other does not costs what the other wastes on it.
    assert math.isfinite(compare(full, logits_of((1, 4, 10), 1), ids).kl)
    # What only the other excludes costs without bound.
    assert compare(logits_of((1, 4, 10)), logits, ids).kl == math.inf


def test_a_probability_that_underflows() -> None:
    full = torch.tensor([[[0.0, -200.0], [0.0, 0.0]]])
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert compare(full, logits, torch.zeros(1, 2, dtype=torch.int64)).kl == pytest.approx(math.log(2), rel=1e-6)


def test_a_broken_model_is_not_a_number() -> None:
    full, ids = logits_of((1, 3, 5)), ids_of(1, 3, 5)
    found = compare(full, full * math.nan, ids).metrics()
    assert math.isnan(found.kl)
    assert math.isnan(found.perplexity)


def test_totals_add_up_to_means() -> None:
    total = Totals(2.0, 0.5, 3, 4) + Totals(2.0, 0.5, 1, 4)
    assert total.metrics() == Metrics(math.exp(0.5), 0.125, 0.5, 8)
    assert Totals(1e6, 0.0, 0, 1).metrics().perplexity == math.inf
    with pytest.raises(ValueError, match="no token was predicted"):
        Totals().metrics()
