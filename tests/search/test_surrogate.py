"""Surrogate model: predictions improve with observations."""

import random

import numpy as np

from matquant.search.mutation import make_offspring, trade_bits
from matquant.search.surrogate import Surrogate
from tests.search.evaluation import AdditiveEvaluator, problem_of_sizes


def test_observations_reduce_the_error_and_the_uncertainty():
    problem = problem_of_sizes([4] * 6, 4)
    truth = AdditiveEvaluator(problem)
    wrong_prior = [{bits: 2 * loss for bits, loss in unit.items()} for unit in truth.terms]
    surrogate = Surrogate(problem, wrong_prior)
    parent = (4,) * 6
    children = make_offspring(problem, parent, 60, random.Random(0), trade_bits)
    differences = [truth.loss(child) - truth.loss(parent) for child in children]
    mean_before, deviation_before = surrogate.predict(parent, children[:20])
    surrogate.observe(parent, children[20:], differences[20:], truth.loss(parent), tokens=2**20)
    mean_after, deviation_after = surrogate.predict(parent, children[:20])
    before, after = (np.abs(np.array(mean) - differences[:20]).mean() for mean in (mean_before, mean_after))
    assert after < 0.35 * before
    assert (deviation_after < deviation_before).all()


def test_prior_mean_is_the_given_losses():
    problem = problem_of_sizes([4] * 3, 4)
    prior = AdditiveEvaluator(problem).terms
    assert Surrogate(problem, prior).unit_losses() == prior
