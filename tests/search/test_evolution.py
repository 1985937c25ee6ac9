"""Evolution on a known loss, with random and surrogate-guided proposals."""

import itertools

import pytest

from matquant.search import knapsack
from matquant.search.allocation_problem import FULL_PRECISION
from matquant.search.config import SearchConfig
from matquant.search.evolution import Evolution
from matquant.search.proposers import RandomProposer, SurrogateProposer
from matquant.search.sensitivity.measured import measure_unit_losses
from matquant.search.surrogate import Surrogate
from tests.search.evaluation import (
    AdditiveEvaluator,
    MemoryJournal,
    dense_forwards,
    evaluate,
    problem_of_model,
    problem_of_sizes,
)

COST_OF_A_GENERATION = 8 * 10 + 4 * 20  # eight children, then the best three and their parent


def evolve(problem, evaluator, proposer, start, journal=None, **changes):
    settings = {"generations": 30, "offspring": 8, "survivors": (3, 1), "tokens": (10, 20)} | changes
    journal = MemoryJournal() if journal is None else journal
    return Evolution(problem, evaluator, proposer, SearchConfig(**settings), journal, "x").run(start)


def guided_proposer(problem, proposals_per_offspring):
    """Surrogate proposer whose prior is equal for all units."""
    prior = [{bits: 4.0**-bits for bits in problem.bits} for _ in problem.units]
    return SurrogateProposer(Surrogate(problem, prior), proposals_per_offspring)


def test_loss_never_increases_and_falls_by_half():
    problem = problem_of_sizes([4] * 10 + [16] * 4)
    evaluator = AdditiveEvaluator(problem)
    start = problem.uniform(3)
    found, history = evolve(problem, evaluator, RandomProposer(), start)
    losses = [entry["loss"] for entry in history]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert problem.fits(found)
    assert losses[-1] == evaluator.loss(found)
    assert losses[-1] < 0.5 * evaluator.loss(start)
    assert history[0]["evaluations"] == 8 + 4
    assert history[0]["tokens"] == COST_OF_A_GENERATION


def test_guided_evolution_finds_the_optimum_from_a_wrong_prior():
    problem = problem_of_sizes([4] * 10 + [16] * 4)
    evaluator = AdditiveEvaluator(problem)
    proposer = guided_proposer(problem, 16)
    found, history = evolve(problem, evaluator, proposer, problem.uniform(3))
    optimum = knapsack.solve(problem, evaluator.terms)
    assert problem.fits(found)
    assert evaluator.loss(found) <= 1.1 * evaluator.loss(optimum)
    assert proposer.skipped == sum(entry["skipped"] for entry in history) > 0


@pytest.mark.parametrize("make_proposer", [lambda _: RandomProposer(), lambda problem: guided_proposer(problem, 4)])
def test_resumed_evolution_gives_the_same_result(make_proposer):
    problem = problem_of_sizes([4] * 8)
    start, whole = problem.uniform(3), MemoryJournal()
    expected = evolve(problem, AdditiveEvaluator(problem), make_proposer(problem), start, whole, generations=6)
    part = MemoryJournal({name: whole[name] for name in list(whole)[:3]})
    evaluator = AdditiveEvaluator(problem)
    assert evolve(problem, evaluator, make_proposer(problem), start, part, generations=6) == expected
    assert evaluator.cost.evaluations == sum(entry["evaluations"] for entry in expected[1][3:])
    assert part == whole


def test_generations_end_once_max_tokens_are_spent():
    problem = problem_of_sizes([4] * 8)
    _, history = evolve(
        problem, AdditiveEvaluator(problem), RandomProposer(), problem.uniform(3), max_tokens=2 * COST_OF_A_GENERATION
    )
    assert len(history) == 2


@pytest.mark.slow
def test_guided_evolution_is_within_two_percent_of_the_best_of_all_candidates(make_model):
    blocks, weights = make_model()
    problem = problem_of_model(blocks, weights, bits=(2, 3, 5))
    with evaluate(blocks, problem.units, dense_forwards(weights)) as evaluator:
        text = evaluator.all_tokens()
        candidates = [c for c in itertools.product(problem.bits, repeat=7) if problem.fits(c)]
        best = min(evaluator.losses(candidates, text))
        spent = evaluator.cost.evaluations
        losses = measure_unit_losses(problem, evaluator, text)
        found, _ = evolve(
            problem,
            evaluator,
            SurrogateProposer(Surrogate(problem, losses), proposals_per_offspring=32),
            knapsack.solve(problem, losses),
            generations=10,
            survivors=(1,),
            tokens=(60,),
        )
        assert evaluator.cost.evaluations - spent < len(candidates) / 4
        assert FULL_PRECISION not in found
        assert evaluator.losses([found], text)[0] <= 1.02 * best
