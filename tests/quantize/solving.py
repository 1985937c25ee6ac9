"""Layers for tests of the solver, and the solver with the Hessian of one activation stream."""

import torch

from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians
from matquant.quantize.gptq.solver import solve as nested_solve

BALANCED = {2: 1.0, 3: 2.0, 4: 4.0, 6: 16.0, 8: 64.0}


def layer(out_features=8, in_features=128, seed=0, tokens=512):
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5 + torch.eye(in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) @ mix
    return weight, 2 * inputs.T @ inputs / tokens


def solve(weight, hessian, options):
    calibration = None if hessian is None else prepare_hessians([HessianStats(hessian=hessian)], options)
    return nested_solve(weight, calibration, options)
