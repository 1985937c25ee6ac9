"""Mutations, the surrogate and evolution, without a model where none is needed."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.search import knapsack, sensitivity
from matquant.search.allocation_problem import Budget, Layer, exact, make_problem
from matquant.search.evaluator import Counts, Sample, open_evaluator
from matquant.search.evolution import Chance, Guided, Selection, evolve
from matquant.search.layer_forwards import DecodedSlices
from matquant.search.mutation import breed, random_start, switch_levels, trade, uniform_start
from matquant.search.surrogate import Surrogate

CPU = torch.device("cpu")


def make(sizes, bits=3.0, widths=(2, 3, 4, 6, 8)):
    layers = [Layer(name=f"l{i}", block=i // 4, parameters=n, bytes={}) for i, n in enumerate(sizes)]
    return make_problem(layers, widths, Budget(kind="average_bits", value=exact(bits)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([4, 8, 32]), min_size=2, max_size=12),
    st.sampled_from([2.0, 2.25, 3.0, 4.7, 8.0]),
    st.integers(0, 1000),
)
def test_no_mutation_exceeds_the_budget(sizes, bits, seed):
    problem, rng = make(sizes, bits), random.Random(seed)
    parent = random_start(problem, rng)
    assert problem.fits(parent)
    for mutate in (switch_levels, trade):
        children = breed(problem, parent, 10, rng, mutate)
        assert all(problem.fits(child) for child in children)
        assert len(set(children)) == len(children)
        assert parent not in children


def test_a_level_switch_stays_within_layers_of_equal_size():
    problem = make([4, 4, 4, 100, 100], 4)
    parent = (4, 4, 4, 4, 4)
    for child in breed(problem, parent, 30, random.Random(0), switch_levels):
        assert sum(child[:3]) <= 12
        assert sum(child[3:]) <= 8
    assert any(sum(child[:3]) > 12 for child in breed(problem, parent, 30, random.Random(0), trade))


def test_uniform_starts():
    assert uniform_start(make([4, 4]), exact(3.0)) == (3, 3)
    assert uniform_start(make([4, 4]), exact(2.5)) is None
    assert uniform_start(make([4, 4]), exact(5.0)) is None


def test_the_surrogate_learns_the_terms_of_a_sum():
    problem = make([4] * 6, 4)
    rng = np.random.default_rng(0)
    truth = [{bits: float(a * 4.0**-bits) for bits in problem.widths} for a in rng.lognormal(0, 1, 6)]
    wrong = [{bits: loss * 2 for bits, loss in unit.items()} for unit in truth]
    surrogate = Surrogate(problem, wrong)
    parent = (4,) * 6
    children = breed(problem, parent, 60, random.Random(0), trade)

    def total(candidate):
        return sum(unit[bits] for unit, bits in zip(truth, candidate, strict=True))

    differences = [total(child) - total(parent) for child in children]
    before, unsure = surrogate.predict(parent, children[:20])
    surrogate.observe(parent, children[20:], differences[20:], total(parent), tokens=2**20)
    after, surer = surrogate.predict(parent, children[:20])
    error = [np.abs(np.array(p) - differences[:20]).mean() for p in (before, after)]
    assert error[1] < 0.35 * error[0]
    assert (surer < unsure).all()


class Additive:
    """An evaluator of a known sum, exact on any tokens."""

    def __init__(self, problem, seed=0):
        rng = np.random.default_rng(seed)
        self.terms = [{b: float(a * 4.0**-b) for b in problem.widths} for a in rng.lognormal(0, 2, len(problem.units))]
        self.counts = Counts()

    def draw(self, tokens, rng):
        return Sample(windows=(0,), last=tokens)

    def size(self, sample):
        return sample.last

    def losses(self, candidates, sample):
        self.counts.evaluations += len(candidates)
        self.counts.tokens += len(candidates) * sample.last
        return [sum(t[b] for t, b in zip(self.terms, c, strict=True)) for c in candidates]


class Memory(dict):
    def load(self, name):
        return self.get(name)

    def save(self, name, value):
        assert name not in self
        self[name] = value


def run(problem, it, proposer, start, journal=None, **changes):
    options = {
        "generations": 30,
        "max_tokens": None,
        "seed": "0",
        "name": "x",
        "journal": Memory() if journal is None else journal,
    }
    selection = Selection(offspring=8, survivors=(3, 1), tokens=(10, 20))
    return evolve(problem, it, start, proposer, selection, **(options | changes))


def test_evolution_never_gets_worse_and_comes_near_the_optimum():
    problem = make([4] * 10 + [16] * 4, 3)
    it = Additive(problem)
    start = uniform_start(problem, exact(3.0))
    found, history = run(problem, it, Chance(), start)
    losses = [entry["loss"] for entry in history]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert problem.fits(found)
    assert losses[-1] < 0.5 * it.losses([start], Sample(windows=(0,), last=1))[0]
    assert history[0]["evaluations"] == 8 + 4  # eight children, then the best three and their parent
    assert history[0]["tokens"] == 8 * 10 + 4 * 20


def test_guided_evolution_finds_an_additive_optimum_from_a_wrong_start():
    problem = make([4] * 10 + [16] * 4, 3)
    it = Additive(problem)
    guess = [{bits: 4.0**-bits for bits in problem.widths} for _ in problem.units]
    proposer = Guided(Surrogate(problem, guess), proposals=16)
    found, history = run(problem, it, proposer, uniform_start(problem, exact(3.0)))
    assert problem.fits(found)
    (best,) = it.losses([knapsack.solve(problem, it.terms)], Sample(windows=(0,), last=1))
    assert history[-1]["loss"] <= 1.1 * best
    assert proposer.skipped == sum(entry["skipped"] for entry in history) > 0


@pytest.mark.parametrize("guided", [False, True])
def test_a_resumed_search_is_the_same_search(guided):
    problem = make([4] * 8, 3)
    start = uniform_start(problem, exact(3.0))

    def proposer():
        guess = [{bits: 4.0**-bits for bits in problem.widths} for _ in problem.units]
        return Guided(Surrogate(problem, guess), proposals=4) if guided else Chance()

    whole = Memory()
    expected = run(problem, Additive(problem), proposer(), start, whole, generations=6)
    part = Memory({name: whole[name] for name in list(whole)[:3]})
    it = Additive(problem)
    assert run(problem, it, proposer(), start, part, generations=6) == expected
    assert it.counts.evaluations < sum(entry["evaluations"] for entry in expected[1])
    assert part == whole


def test_it_ends_when_the_tokens_are_spent():
    problem = make([4] * 8, 3)
    start = uniform_start(problem, exact(3.0))
    _, history = run(problem, Additive(problem), Chance(), start, max_tokens=2 * (8 * 10 + 4 * 20))
    assert len(history) == 2


def test_errors_between_recorded_widths_are_interpolated():
    problem = make([4, 4], widths=(2, 3, 4, 8))
    recorded = {"l0": {"2": 0.16, "4": 0.01}, "l1": {"2": 0.4, "3": 0.1, "4": 0.02, "8": 0.001}}
    found = sensitivity.from_errors(problem, recorded)
    assert found[0] == pytest.approx({2: 0.16, 3: 0.04, 4: 0.01, 8: 0.01 / 256})
    assert found[1] == pytest.approx({2: 0.4, 3: 0.1, 4: 0.02, 8: 0.001})
    with pytest.raises(ValueError, match="no second-order error is recorded for l1"):
        sensitivity.from_errors(problem, {"l0": {"2": 1.0}, "l1": {}})


class Uneven(Additive):
    """Each unit has its share of the loss whatever the width, and together they lose less than alone."""

    def losses(self, candidates, sample):
        sums = super().losses([tuple(b or 99 for b in c) for c in candidates], sample)
        return [0.5 + s * (0.75 if 0 not in c else 1) for c, s in zip(candidates, sums, strict=True)]

    def __init__(self, problem):
        super().__init__(problem)
        fall = {2: 1.0, 3: 0.2, 4: 0.06, 6: 0.005, 8: 0.002, 99: 0.0}
        self.terms = [{b: unit[4] * f for b, f in fall.items()} for unit in self.terms]


def test_shares_of_the_uniform_slices_from_few_measurements():
    problem = make([4] * 6, 3.5)
    it = Uneven(problem)
    assert sensitivity.anchors_of(problem) == {3, 4}
    sample = Sample(windows=(0,), last=10)
    found = sensitivity.measure_shares(problem, it, sample, [3, 4])
    assert it.counts.evaluations == 1 + 5 + 2 * 6
    assert found == [pytest.approx({b: 0.75 * t[b] for b in problem.widths}) for t in it.terms]
    assert sensitivity.measure(problem, it, sample) == [
        pytest.approx({b: t[b] for b in problem.widths}) for t in it.terms
    ]


@pytest.mark.parametrize(
    ("bits", "widths", "anchors"), [(2, (2, 4), {2, 4}), (8, (2, 8), {8}), (5, (2, 4, 6, 8), {4, 6})]
)
def test_anchors_are_the_widths_next_to_the_budget(bits, widths, anchors):
    assert sensitivity.anchors_of(make([4, 8], bits, widths)) == anchors


def test_guided_evolution_is_within_two_percent_of_the_best_of_all_allocations(make_model):
    """Every allocation of a model of 7 layers and 3 widths, measured; the search measures a few of them."""
    blocks, codes = make_model()
    layers = [Layer(name=n, block=0, parameters=w.codes.numel(), bytes={}) for n, w in codes.items()]
    problem = make_problem(layers, (2, 3, 5), Budget(kind="average_bits", value=exact(3)))
    windows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(2))
    slices = DecodedSlices(codes, CPU, torch.float32, 2**30)
    with open_evaluator(blocks, problem.units, slices, windows, batch_size=4, fitness="kl", top_k=1, device=CPU) as it:
        everything = [c for c in itertools.product(problem.widths, repeat=7) if problem.fits(c)]
        best = min(it.losses(everything, it.everything()))
        spent = it.counts.evaluations
        losses = sensitivity.measure(problem, it, it.everything())
        guided = Guided(Surrogate(problem, losses), proposals=32)
        found, _ = evolve(
            problem,
            it,
            knapsack.solve(problem, losses),
            guided,
            Selection(offspring=8, survivors=(1,), tokens=(64,)),
            generations=10,
            max_tokens=None,
            seed="0",
            journal=Memory(),
            name="x",
        )
        assert it.counts.evaluations - spent < len(everything) / 4
        assert it.losses([found], it.everything())[0] <= 1.02 * best
