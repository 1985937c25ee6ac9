"""Fitness functions by the value of ``search.fitness``."""

from matquant.search.fitness.fitness_function import FitnessFunction
from matquant.search.fitness.kl_divergence import KlDivergence
from matquant.search.fitness.perplexity import Perplexity
from matquant.search.fitness.sparse_kl_divergence import SparseKlDivergence

FITNESS_FUNCTIONS: dict[str, type[FitnessFunction]] = {
    "kl": KlDivergence,
    "sparse_kl": SparseKlDivergence,
    "perplexity": Perplexity,
}

__all__ = ["FITNESS_FUNCTIONS", "FitnessFunction"]
