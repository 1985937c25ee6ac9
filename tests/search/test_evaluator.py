"""The in-memory evaluator against the evaluation of whole models, block by block."""

import dataclasses
import math
import random

import pytest
import torch

from matquant.distributed import ProcessGroup
from matquant.evaluate.slices import FULL as FULL_NAME
from matquant.evaluate.slices import evaluate_slices
from matquant.search.evaluator import FULL
from tests.search.measuring import WINDOWS, evaluator, units_of


def random_candidates(units, count):
    rng = random.Random(0)
    return [tuple(rng.choice((FULL, 2, 3, 4, 8)) for _ in units) for _ in range(count)]


def reference(blocks, units, codes, candidates):
    names = {str(i): c for i, c in enumerate(candidates)}

    def weights_of(index, variant):
        widths = {n: bits for unit, bits in zip(units, names[variant], strict=True) for n in unit.layers}
        linears = blocks.linears(index) if index < len(blocks) else {}
        return {n: codes[n].dequantize(widths[n]) for n in linears if widths[n] != FULL}

    return evaluate_slices(blocks, WINDOWS, weights_of, list(names), 2, "cpu")


@pytest.mark.parametrize("limit", [0, 20_000, 2**30])
def test_kl_is_that_of_the_evaluation_whatever_the_cache_holds(make_model, limit):
    blocks, codes = make_model(2)
    units = units_of(blocks, codes, fused=[[n for n in codes if "mlp" in n and "layers.0" in n]])
    candidates = random_candidates(units, 12)
    expected = reference(blocks, units, codes, candidates)
    with evaluator(blocks, units, codes, limit=limit) as it:
        found = it.losses(candidates, it.everything())
        assert it.slices.bytes <= max(limit, max(w.nbytes for w in it.slices.held.values()))
        again = it.losses(candidates[::-1], it.everything())
    assert found == pytest.approx([expected[str(i)].kl for i in range(12)], rel=1e-4, abs=1e-6)
    assert again[::-1] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_nested_layers_serve_the_same_candidates(make_model, bias):
    blocks, codes = make_model(2, bias)
    units = units_of(blocks, codes)
    candidates = random_candidates(units, 6)
    expected = reference(blocks, units, codes, candidates)
    with evaluator(blocks, units, codes, planes=True) as it:
        found = it.losses(candidates, it.everything())
    assert found == pytest.approx([expected[str(i)].kl for i in range(6)], rel=1e-4, abs=1e-6)
    assert reference(blocks, units, codes, candidates)["0"].kl == expected["0"].kl  # the layers are their own again


class Apart(ProcessGroup):
    """One of several processes, which keeps what it has instead of adding what the others have."""

    def all_reduce(self, tensor):
        pass


@pytest.mark.parametrize("count", [2, 5])
def test_several_processes_measure_each_candidate_once_and_the_same(make_model, count):
    blocks, codes = make_model(2)
    units = units_of(blocks, codes)
    candidates = random_candidates(units, 4)
    with evaluator(blocks, units, codes) as it:
        expected = it.losses(candidates, it.everything())
        spent = dataclasses.asdict(it.counts)
    parts = []
    for rank in range(count):
        with evaluator(blocks, units, codes, process_group=Apart(rank, count)) as it:
            parts.append(it.losses(candidates, it.everything()))
            assert dataclasses.asdict(it.counts) == spent  # of all processes together
    assert [sum(values) for values in zip(*parts, strict=True)] == expected
    assert all(sum(value > 0 for value in values) == 1 for values in zip(*parts, strict=True))


def test_perplexity_and_sparse_kl(make_model):
    blocks, codes = make_model(2)
    units = units_of(blocks, codes)
    candidates = random_candidates(units, 3)
    expected = reference(blocks, units, codes, candidates)
    with evaluator(blocks, units, codes, fitness="perplexity") as it:
        found = it.losses(candidates, it.everything())
        full = it.losses([(FULL,) * len(units)], it.everything())
    assert found == pytest.approx([math.log(expected[str(i)].perplexity) for i in range(3)], rel=1e-5)
    assert full == pytest.approx([math.log(expected[FULL_NAME].perplexity)], rel=1e-5)
    # All 64 tokens of the vocabulary among the likeliest: nothing is left out.
    with evaluator(blocks, units, codes, fitness="sparse_kl", top_k=64) as it:
        assert it.losses(candidates, it.everything()) == pytest.approx(
            [expected[str(i)].kl for i in range(3)], rel=1e-3
        )
    with evaluator(blocks, units, codes, fitness="sparse_kl", top_k=1) as it:
        assert it.losses(candidates, it.everything()) == pytest.approx([0, 0, 0], abs=1e-5)


def test_the_full_model_is_no_loss_and_gets_its_weights_back(make_model):
    blocks, codes = make_model()
    own = {name: layer.weight for name, layer in blocks.linears(0).items()}
    with evaluator(blocks, units_of(blocks, codes), codes) as it:
        losses = it.losses([(FULL,) * 7, (2,) * 7], it.everything())
        assert blocks.linears(0)["model.layers.0.mlp.up_proj"].weight.dtype == torch.float32
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 0.01
    assert all(blocks.linears(0)[name].weight is weight for name, weight in own.items())


def test_a_sample_has_the_tokens_asked_for_and_the_last_window_is_cut(make_model):
    blocks, codes = make_model()
    with evaluator(blocks, units_of(blocks, codes), codes) as it:
        rng = random.Random(0)
        assert [it.size(it.draw(tokens, rng)) for tokens in (5, 12, 13, 31, 60, 1000)] == [5, 12, 14, 31, 60, 60]
        sample = it.draw(31, random.Random(3))
        # The mean over the predicted tokens is that of the windows one by one.
        parts = [it.losses([(2,) * 7], type(sample)(windows=(w,), last=12))[0] for w in sample.windows[:-1]]
        parts.append(it.losses([(2,) * 7], type(sample)(windows=sample.windows[-1:], last=sample.last))[0])
        expected = (11 * sum(parts[:-1]) + (sample.last - 1) * parts[-1]) / (11 * (len(parts) - 1) + sample.last - 1)
        assert it.losses([(2,) * 7], sample)[0] == pytest.approx(expected, rel=1e-4)
        before = it.counts.tokens
        it.losses([(2,) * 7, (3,) * 7], sample)
        assert it.counts.tokens - before == 62


def test_slices_are_decoded_once(make_model):
    blocks, codes = make_model()
    with evaluator(blocks, units_of(blocks, codes), codes) as it:
        for _ in range(3):
            it.losses([(2,) * 7, (3,) * 7], it.everything())
        assert it.slices.decoded == 14
