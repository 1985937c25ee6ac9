"""Several candidates in one forward pass give what each of them gives alone."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.search.candidate_batching import branches, by_width, forward_by_width, spread
from matquant.search.evaluator import FULL, open_evaluator
from matquant.search.layer_forwards import DecodedSlices
from tests.search.measuring import CPU, WINDOWS, evaluator, units_of


def neighbours(units, count):
    """Candidates that differ from one another in few units, one of them twice, the full model among them."""
    rng = random.Random(2)
    parent = [3] * units
    found = [tuple(parent), tuple(parent), (FULL,) * units]
    while len(found) < count:
        child = list(parent)
        for unit in rng.sample(range(units), 2):
            child[unit] = rng.choice((FULL, 2, 4, 8))
        found.append(tuple(child))
    return found


@pytest.mark.parametrize("fitness", ["kl", "sparse_kl", "perplexity"])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("together", [10, 15, 1000])
def test_candidates_that_are_measured_together_lose_what_each_loses_alone(make_model, fitness, planes, together):
    blocks, codes = make_model(3, True)
    fused = [[n for n in codes if "mlp" in n and "layers.1" in n]]
    units = units_of(blocks, codes, fused)
    candidates = neighbours(len(units), 11)
    found = []
    for batch_size in (5, together):
        with evaluator(blocks, units, codes, fitness, top_k=8, batch_size=batch_size, planes=planes) as it:
            sample = it.draw(40, random.Random(0))  # its last window is cut
            found.append((it.losses(candidates, it.everything()), it.losses(candidates[::-1], sample)))
    for alone, mixed in zip(*found, strict=True):
        assert mixed == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert all("forward" not in layer.__dict__ for i in range(3) for layer in blocks.linears(i).values())


def test_what_candidates_have_in_common_is_computed_once(make_model, monkeypatch):
    blocks, codes = make_model(2)
    rows = []
    run = blocks.run_block
    monkeypatch.setattr(blocks, "run_block", lambda i, h, call: rows.append((i, len(h))) or run(i, h, call))
    candidates = [(2,) * 7 + (bits,) * 7 for bits in (2, 3, 4)] + [(3,) * 14]
    with evaluator(blocks, units_of(blocks, codes), codes, batch_size=20) as it:
        rows.clear()
        it.losses(candidates, it.everything())
    assert rows == [(0, 10), (1, 20)]  # of five windows each


def test_slices_that_do_not_fit_in_memory_together_are_used_one_after_the_other(make_model, monkeypatch):
    blocks, codes = make_model(2)
    rows = []
    run = blocks.run_block
    monkeypatch.setattr(blocks, "run_block", lambda i, h, call: rows.append(len(h)) or run(i, h, call))
    with evaluator(blocks, units_of(blocks, codes), codes, batch_size=1000, limit=20_000) as it:
        it.losses(neighbours(14, 6), it.everything())
    assert set(rows) == {5}


def test_experts_see_one_candidate_at_a_time():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=None,
    )
    blocks = BlockModel(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    with open_evaluator(
        blocks,
        [],
        DecodedSlices({}, CPU, torch.float32, 2**30),
        WINDOWS,
        batch_size=1000,
        fitness="perplexity",
        top_k=1,
        device=CPU,
    ) as it:
        assert [len(group) for group in it._passes([(), ()], 5)] == [1, 1]


def test_runs_of_a_layer_get_their_rows_and_no_others():
    factors = {2: 10.0, 3: 100.0}
    runs = by_width((2, 2, 3, 2), lambda bits: lambda hidden: hidden * factors[bits])
    assert [count for count, _ in runs] == [2, 1, 1]
    hidden = torch.ones(8, 3, 1)
    expected = [10.0] * 4 + [100.0] * 2 + [10.0] * 2
    for shape in ((8, 3, 1), (24, 1)):
        output = forward_by_width(hidden.view(shape), runs=runs, rows=8, length=3, name="layer")
        assert output.shape == shape
        assert output.view(8, 3).mean(1).tolist() == expected
    with pytest.raises(UserError, match=r"layer gets an input of shape \[7, 1\].*search.batch_size=1"):
        forward_by_width(torch.ones(7, 1), runs=runs, rows=8, length=3, name="layer")


def test_branches_and_their_hidden_states():
    alike = [2, 0, 1, 3]  # of five candidates
    assert [branches(alike, index) for index in range(4)] == [[0, 2], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    hidden = torch.tensor([[0.0], [0.5], [2.0], [2.5]])  # two windows each
    assert spread(hidden, [0, 2], [0, 2]) is hidden
    assert spread(hidden, [0, 2], [0, 2, 3]).flatten().tolist() == [0, 0.5, 2, 2.5, 2, 2.5]
    assert spread(hidden, [0, 2], [0, 1, 2]).flatten().tolist() == [0, 0.5, 0, 0.5, 2, 2.5]
