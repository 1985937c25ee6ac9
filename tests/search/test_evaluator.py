"""Evaluator against the block-wise evaluation of whole slices."""

import dataclasses
import math
import random

import pytest
import torch

from matquant.distributed import ProcessGroup
from matquant.errors import UserError
from matquant.evaluate.slices import FULL, evaluate_slices
from matquant.search.allocation_problem import FULL_PRECISION
from matquant.search.fitness.perplexity import Perplexity
from matquant.search.fitness.sparse_kl_divergence import SparseKlDivergence
from matquant.search.layer_forwards import DenseLayerForwards, PlaneLayerForwards, make_layer_forwards
from matquant.search.token_sample import TokenSample
from tests.search.evaluation import CPU, SEQUENCES, dense_forwards, evaluate, plane_forwards, problem_of_model


def random_candidates(units, count):
    rng = random.Random(0)
    return [tuple(rng.choice((FULL_PRECISION, 2, 3, 4, 8)) for _ in units) for _ in range(count)]


def reference_metrics(blocks, units, weights, candidates):
    """Metrics of each candidate by its index as a string, from ``evaluate_slices``."""
    by_name = {str(i): candidate for i, candidate in enumerate(candidates)}

    def dense_weights(index, slice_name):
        bits_of = {name: bits for unit, bits in zip(units, by_name[slice_name], strict=True) for name in unit.layers}
        linears = blocks.linears(index) if index < len(blocks) else {}
        return {name: weights[name].dequantize(bits_of[name]) for name in linears if bits_of[name] != FULL_PRECISION}

    return evaluate_slices(blocks, SEQUENCES, dense_weights, list(by_name), 2, "cpu")


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 2**30])
def test_kl_equals_the_evaluation_with_any_cache_size(make_model, cache_bytes):
    blocks, weights = make_model(2)
    fused = [[name for name in weights if "mlp" in name and "layers.0" in name]]
    units = problem_of_model(blocks, weights, fused_groups=fused).units
    candidates = random_candidates(units, 12)
    expected = reference_metrics(blocks, units, weights, candidates)
    forwards = dense_forwards(weights, cache_bytes)
    with evaluate(blocks, units, forwards) as evaluator:
        found = evaluator.losses(candidates, evaluator.all_tokens())
        largest = max(4 * weight.codes.numel() for weight in weights.values())
        assert forwards.cache.nbytes <= max(cache_bytes, largest)
        again = evaluator.losses(candidates[::-1], evaluator.all_tokens())
    assert found == pytest.approx([expected[str(i)].kl for i in range(12)], rel=1e-4, abs=1e-6)
    assert again[::-1] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_plane_forwards_give_the_kl_of_the_evaluation(make_model, bias):
    blocks, weights = make_model(2, bias)
    units = problem_of_model(blocks, weights).units
    candidates = random_candidates(units, 6)
    expected = reference_metrics(blocks, units, weights, candidates)
    with evaluate(blocks, units, plane_forwards(weights)) as evaluator:
        found = evaluator.losses(candidates, evaluator.all_tokens())
    assert found == pytest.approx([expected[str(i)].kl for i in range(6)], rel=1e-4, abs=1e-6)
    restored = reference_metrics(blocks, units, weights, candidates)
    assert restored["0"].kl == expected["0"].kl


@pytest.mark.parametrize(
    ("choice", "kind"), [("auto", DenseLayerForwards), ("dense", DenseLayerForwards), ("planes", PlaneLayerForwards)]
)
def test_layer_forward_setting_chooses_the_implementation(make_model, choice, kind):
    _, weights = make_model()
    assert isinstance(make_layer_forwards(choice, weights, CPU, torch.float32, 0), kind)


class WithoutAllReduce(ProcessGroup):
    """Process of a group whose all-reduce leaves out the other processes."""

    def all_reduce(self, tensor):
        pass


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_evaluate_each_candidate_once(make_model, world_size):
    blocks, weights = make_model(2)
    units = problem_of_model(blocks, weights).units
    candidates = random_candidates(units, 4)
    with evaluate(blocks, units, dense_forwards(weights)) as evaluator:
        expected = evaluator.losses(candidates, evaluator.all_tokens())
        cost = dataclasses.asdict(evaluator.cost)
    shards = []
    for rank in range(world_size):
        process_group = WithoutAllReduce(rank, world_size)
        with evaluate(blocks, units, dense_forwards(weights), process_group=process_group) as evaluator:
            shards.append(evaluator.losses(candidates, evaluator.all_tokens()))
            assert dataclasses.asdict(evaluator.cost) == cost  # summed over the processes
    assert [sum(losses) for losses in zip(*shards, strict=True)] == expected
    assert all(sum(loss > 0 for loss in losses) == 1 for losses in zip(*shards, strict=True))


def test_perplexity_equals_the_evaluation(make_model):
    blocks, weights = make_model(2)
    units = problem_of_model(blocks, weights).units
    candidates = random_candidates(units, 3)
    expected = reference_metrics(blocks, units, weights, candidates)
    with evaluate(blocks, units, dense_forwards(weights), fitness=Perplexity()) as evaluator:
        found = evaluator.losses(candidates, evaluator.all_tokens())
        full = evaluator.losses([(FULL_PRECISION,) * len(units)], evaluator.all_tokens())
    assert found == pytest.approx([math.log(expected[str(i)].perplexity) for i in range(3)], rel=1e-5)
    assert full == pytest.approx([math.log(expected[FULL].perplexity)], rel=1e-5)


def test_sparse_kl_of_the_whole_vocabulary_equals_kl_and_of_one_token_is_zero(make_model):
    blocks, weights = make_model(2)
    units = problem_of_model(blocks, weights).units
    candidates = random_candidates(units, 3)
    expected = reference_metrics(blocks, units, weights, candidates)
    with evaluate(blocks, units, dense_forwards(weights), fitness=SparseKlDivergence(top_k=64)) as evaluator:
        found = evaluator.losses(candidates, evaluator.all_tokens())
    assert found == pytest.approx([expected[str(i)].kl for i in range(3)], rel=1e-3)
    with evaluate(blocks, units, dense_forwards(weights), fitness=SparseKlDivergence(top_k=1)) as evaluator:
        assert evaluator.losses(candidates, evaluator.all_tokens()) == pytest.approx([0, 0, 0], abs=1e-5)


def test_full_precision_has_no_loss_and_weights_are_restored(make_model):
    blocks, weights = make_model()
    own = {name: layer.weight for name, layer in blocks.linears(0).items()}
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights)) as evaluator:
        losses = evaluator.losses([(FULL_PRECISION,) * 7, (2,) * 7], evaluator.all_tokens())
        assert blocks.linears(0)["model.layers.0.mlp.up_proj"].weight.dtype == torch.float32
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 0.01
    assert all(blocks.linears(0)[name].weight is weight for name, weight in own.items())


def test_sample_has_the_requested_number_of_tokens(make_model):
    blocks, weights = make_model()
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights)) as evaluator:
        rng = random.Random(0)
        sizes = [evaluator.draw(tokens, rng).tokens for tokens in (5, 12, 13, 31, 60, 1000)]
        assert sizes == [5, 12, 14, 31, 60, 60]  # at least two tokens of the last sequence; at most the text
        sample = evaluator.draw(31, random.Random(3))
        evaluator.losses([(2,) * 7, (3,) * 7], sample)
        assert evaluator.cost.tokens == 2 * 31


def test_loss_of_a_sample_is_the_mean_over_its_predicted_tokens(make_model):
    blocks, weights = make_model()
    units = problem_of_model(blocks, weights).units
    with evaluate(blocks, units, dense_forwards(weights)) as evaluator:
        sample = evaluator.draw(31, random.Random(3))
        lengths = [12] * (len(sample.rows) - 1) + [sample.last_length]
        parts = [
            evaluator.losses([(2,) * 7], TokenSample(rows=(row,), length=12, last_length=length))[0]
            for row, length in zip(sample.rows, lengths, strict=True)
        ]
        predicted = [length - 1 for length in lengths]
        expected = sum(n * loss for n, loss in zip(predicted, parts, strict=True)) / sum(predicted)
        assert evaluator.losses([(2,) * 7], sample)[0] == pytest.approx(expected, rel=1e-4)


def test_each_layer_is_dequantized_once_per_bit_width(make_model):
    blocks, weights = make_model()
    units = problem_of_model(blocks, weights).units
    forwards = dense_forwards(weights)
    with evaluate(blocks, units, forwards) as evaluator:
        for _ in range(3):
            evaluator.losses([(2,) * 7, (3,) * 7], evaluator.all_tokens())
    assert forwards.cache.misses == 14


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_search(make_model, value):
    blocks, weights = make_model(1)
    name = "model.layers.0.mlp.down_proj"
    weights[name].scales[0, 0] = value
    units = problem_of_model(blocks, weights).units
    with (
        evaluate(blocks, units, dense_forwards(weights)) as evaluator,
        pytest.raises(UserError, match=r"measured a loss of (nan|inf) for the bit-widths 8, 8"),
    ):
        evaluator.losses([tuple(8 for _ in units)], evaluator.all_tokens())
