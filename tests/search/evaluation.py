"""Builders of evaluators and problems, and an evaluator of a known loss."""

import numpy as np
import torch

from matquant.distributed import SINGLE_PROCESS
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.search.allocation_problem import Budget, LayerCost, decimal_fraction, make_problem
from matquant.search.evaluator import EvaluatorConfig, SearchCost, open_evaluator
from matquant.search.fitness.kl_divergence import KlDivergence
from matquant.search.layer_forwards import DenseLayerForwards, PlaneLayerForwards
from matquant.search.token_sample import all_tokens

SEQUENCES = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def round_to_nearest(weight):
    """Nested weight with the nearest 8-bit codes and one scale per row."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    codes = (weight.float() / scales.float() + 127.5).round().clamp(0, 255).to(torch.uint8)
    weight_format = WeightFormat(master_bits=8, slicing="msb", group_size=weight.shape[1], scale_dtype=torch.float16)
    return NestedWeight(codes=codes, scales=scales, zeros=None, format=weight_format)


def average_bits_budget(bits):
    return Budget(kind="average_bits", value=decimal_fraction(bits))


def problem_of_sizes(sizes, average_bits=3.0, bits=(2, 3, 4, 6, 8)):
    """Problem with one unit per number of parameters, four units per block."""
    layers = [LayerCost(name=f"l{i}", block=i // 4, parameters=size, bytes_read={}) for i, size in enumerate(sizes)]
    return make_problem(layers, bits, average_bits_budget(average_bits))


def problem_of_model(blocks, weights, bits=(2, 3, 4, 8), fused_groups=()):
    """Problem with the layers of a model, under a budget of 3 bits."""
    block_of = {name: i for i in range(len(blocks)) for name in blocks.linears(i)}
    layers = [
        LayerCost(name=name, block=block_of[name], parameters=weight.codes.numel(), bytes_read={})
        for name, weight in weights.items()
    ]
    return make_problem(layers, bits, average_bits_budget(3), fused_groups)


def dense_forwards(weights, cache_bytes=2**30):
    return DenseLayerForwards(weights, CPU, torch.float32, cache_bytes)


def plane_forwards(weights):
    return PlaneLayerForwards(weights, CPU, torch.float32)


def evaluate(blocks, units, layer_forwards, *, fitness=None, batch_size=2, process_group=SINGLE_PROCESS):
    """Evaluator on ``SEQUENCES``, as a context manager."""
    config = EvaluatorConfig(
        fitness=fitness or KlDivergence(), batch_size=batch_size, device=CPU, process_group=process_group
    )
    return open_evaluator(blocks, units, layer_forwards, SEQUENCES, config)


class AdditiveEvaluator:
    """Evaluator whose loss is a known sum over the units, equal on all tokens.

    Attributes:
        terms: loss of each unit at each bit-width.
    """

    def __init__(self, problem, seed=0):
        rng = np.random.default_rng(seed)
        self.terms = [
            {bits: float(a * 4.0**-bits) for bits in problem.bits} for a in rng.lognormal(0, 2, len(problem.units))
        ]
        self.cost = SearchCost()

    def all_tokens(self):
        return all_tokens(1, 100)

    def draw(self, tokens, rng):
        return all_tokens(1, tokens)

    def losses(self, candidates, sample):
        self.cost.evaluations += len(candidates)
        self.cost.tokens += len(candidates) * sample.tokens
        return [self.loss(candidate) for candidate in candidates]

    def loss(self, candidate):
        """Sum of the terms; a unit in full precision adds nothing."""
        return sum(term.get(bits, 0.0) for term, bits in zip(self.terms, candidate, strict=True))


class MemoryJournal(dict):
    """Journal in a dictionary. Saving a step twice is an error."""

    def load(self, name):
        return self.get(name)

    def save(self, name, value):
        assert name not in self
        self[name] = value
