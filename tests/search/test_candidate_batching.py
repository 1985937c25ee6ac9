"""Several candidates in one forward pass: results equal those of one candidate per pass."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.search.allocation_problem import FULL_PRECISION
from matquant.search.candidate_batching import divergence_points, expand, forward_by_bits, runs_by_bits
from matquant.search.fitness.kl_divergence import KlDivergence
from matquant.search.fitness.perplexity import Perplexity
from matquant.search.fitness.sparse_kl_divergence import SparseKlDivergence
from tests.search.evaluation import dense_forwards, evaluate, plane_forwards, problem_of_model, round_to_nearest


def similar_candidates(units, count):
    """Candidates that differ in two units from a parent; the parent twice and the full-precision model among them."""
    rng = random.Random(2)
    parent = [3] * units
    found = [tuple(parent), tuple(parent), (FULL_PRECISION,) * units]
    while len(found) < count:
        child = list(parent)
        for unit in rng.sample(range(units), 2):
            child[unit] = rng.choice((FULL_PRECISION, 2, 4, 8))
        found.append(tuple(child))
    return found


def record_rows(blocks, monkeypatch):
    """List of (block index, rows) of all later calls of ``run_block``."""
    calls = []
    run_block = blocks.run_block
    monkeypatch.setattr(
        blocks, "run_block", lambda i, hidden, kwargs: calls.append((i, len(hidden))) or run_block(i, hidden, kwargs)
    )
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("fitness", [KlDivergence(), SparseKlDivergence(top_k=8), Perplexity()])
@pytest.mark.parametrize("make_forwards", [dense_forwards, plane_forwards])
@pytest.mark.parametrize("batch_size", [10, 15, 1000])
def test_losses_in_one_batch_equal_losses_alone(make_model, fitness, make_forwards, batch_size):
    blocks, weights = make_model(3, True)
    fused = [[name for name in weights if "mlp" in name and "layers.1" in name]]
    units = problem_of_model(blocks, weights, fused_groups=fused).units
    candidates = similar_candidates(len(units), 11)
    found = []
    for size in (5, batch_size):
        with evaluate(blocks, units, make_forwards(weights), fitness=fitness, batch_size=size) as evaluator:
            sample = evaluator.draw(40, random.Random(0))  # the last sequence is cut
            whole = evaluator.losses(candidates, evaluator.all_tokens())
            found.append((whole, evaluator.losses(candidates[::-1], sample)))
    for alone, together in zip(*found, strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert all("forward" not in layer.__dict__ for i in range(3) for layer in blocks.linears(i).values())


def test_shared_leading_blocks_are_computed_once(make_model, monkeypatch):
    blocks, weights = make_model(2)
    calls = record_rows(blocks, monkeypatch)
    candidates = [(2,) * 7 + (bits,) * 7 for bits in (2, 3, 4)] + [(3,) * 14]
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights), batch_size=20) as evaluator:
        calls.clear()
        evaluator.losses(candidates, evaluator.all_tokens())
    assert calls == [(0, 10), (1, 20)]  # five sequences per copy: two copies, then four


def test_candidates_run_one_at_a_time_if_the_cache_is_too_small(make_model, monkeypatch):
    blocks, weights = make_model(2)
    calls = record_rows(blocks, monkeypatch)
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights, cache_bytes=20_000), batch_size=1000) as evaluator:
        evaluator.losses(similar_candidates(14, 6), evaluator.all_tokens())
    assert {rows for _, rows in calls} == {5}


def test_candidates_run_one_at_a_time_in_a_mixture_of_experts(monkeypatch):
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
    weights = {name: round_to_nearest(layer.weight) for name, layer in blocks.linears(0).items() if "self_attn" in name}
    calls = record_rows(blocks, monkeypatch)
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights), batch_size=1000) as evaluator:
        calls.clear()
        evaluator.losses([(2, 2, 2, 2), (3, 3, 3, 3)], evaluator.all_tokens())
    assert calls == [(0, 5), (0, 5)]


def test_each_run_of_equal_bits_gets_its_own_rows():
    factors = {2: 10.0, 3: 100.0}
    runs = runs_by_bits((2, 2, 3, 2), lambda bits: lambda hidden: hidden * factors[bits])
    assert [copies for copies, _ in runs] == [2, 1, 1]
    hidden = torch.ones(8, 3, 1)
    expected = [10.0] * 4 + [100.0] * 2 + [10.0] * 2
    for shape in ((8, 3, 1), (24, 1)):
        output = forward_by_bits(hidden.view(shape), runs=runs, rows=8, length=3, name="layer")
        assert output.shape == shape
        assert output.view(8, 3).mean(1).tolist() == expected


def test_input_of_an_unexpected_shape_is_refused():
    runs = runs_by_bits((2, 3), lambda bits: lambda hidden: hidden)
    with pytest.raises(UserError, match=r"layer has shape \[7, 1\].*search.batch_size=1"):
        forward_by_bits(torch.ones(7, 1), runs=runs, rows=8, length=3, name="layer")


def test_divergence_points_of_five_candidates():
    common_blocks = [2, 0, 1, 3]
    points = [divergence_points(common_blocks, index) for index in range(4)]
    assert points == [[0, 2], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_expand_repeats_the_hidden_states_of_the_preceding_candidate():
    hidden = torch.tensor([[0.0], [0.5], [2.0], [2.5]])  # two sequences per candidate
    assert expand(hidden, [0, 2], [0, 2]) is hidden
    assert expand(hidden, [0, 2], [0, 2, 3]).flatten().tolist() == [0, 0.5, 2, 2.5, 2, 2.5]
    assert expand(hidden, [0, 2], [0, 1, 2]).flatten().tolist() == [0, 0.5, 0, 0.5, 2, 2.5]
