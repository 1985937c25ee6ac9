"""Solver with cross-Hessians of the full-precision model, and with a Hessian for each bit-width."""

import pytest
import torch
from solving import BALANCED, layer

from matquant.formats.nested import levels
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve as nested_solve


def two_streams(seed=0, columns=64, tokens=512):
    """A weight, and inputs [tokens, columns] of the full-precision and of the quantized model."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    full /= columns**0.5
    quantized = full + 0.3 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(8, columns, generator=generator) * 0.05, full, quantized


def moments(full, quantized):
    n = len(full)
    return HessianStats(hessian=2 * quantized.T @ quantized / n, cross_hessian=2 * (full - quantized).T @ quantized / n)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_cross_moments_bring_the_outputs_nearer_to_those_of_the_full_model(seed, act_order):
    weight, full, quantized = two_streams(seed)
    given_inputs = moments(full, quantized)
    options = SolverOptions(lambdas=BALANCED, group_size=32, cd_passes=1, act_order=act_order)
    lost = []
    for inputs in (HessianStats(hessian=given_inputs.hessian), given_inputs):
        solved = nested_solve(weight, prepare_hessians([inputs], options), options)
        lost.append({b: ((full @ weight.T - quantized @ solved.dequantize(b).T) ** 2).sum().item() for b in BALANCED})
    assert sum(lam * lost[1][b] for b, lam in BALANCED.items()) < sum(lam * lost[0][b] for b, lam in BALANCED.items())
    assert all(lost[1][b] < lost[0][b] for b in (4, 6, 8))


def test_the_shift_is_that_of_least_squares():
    weight, full, quantized = two_streams(2)
    options = SolverOptions(lambdas={4: 1.0}, group_size=32, damp=1e-7)
    calibration = prepare_hessians([moments(full, quantized)], options)
    expected = torch.linalg.lstsq(quantized.double(), full.double() @ weight.T.double()).solution.T
    shifted = weight + weight @ calibration.corrections[0]
    torch.testing.assert_close(shifted, expected.float(), rtol=1e-3, atol=1e-4)


def own_hessians(columns, widths=BALANCED):
    """A Hessian for each width, of inputs that are not alike."""
    return [layer(1, columns, seed=100 + b)[1] for b in widths]


@pytest.mark.parametrize("act_order", [False, True])
def test_equal_hessians_per_width_are_one_shared(act_order):
    weight, hessian = layer(8, 64)
    options = SolverOptions(lambdas=BALANCED, group_size=32, act_order=act_order, zero_point_offset=8.0, cd_passes=1)
    one = prepare_hessians([HessianStats(hessian=hessian)], options)
    many = prepare_hessians([HessianStats(hessian=hessian.clone()) for _ in BALANCED], options)
    shared = HessianStats(hessian=hessian)
    same = prepare_hessians([shared] * len(BALANCED), options)
    assert (len(one.factors), len(many.factors), len(same.factors)) == (1, 5, 5)
    expected = nested_solve(weight, one, options)
    for calibration in (many, same):
        solved = nested_solve(weight, calibration, options)
        assert torch.equal(solved.codes, expected.codes)
        assert torch.equal(solved.scales, expected.scales)


@pytest.mark.parametrize("slicing", ["msb", "round"])
def test_the_first_column_minimises_what_its_errors_cost_each_width(slicing):
    weight, _ = layer(64, 32)
    hessians = own_hessians(32)
    options = SolverOptions(lambdas=BALANCED, slicing=slicing, group_size=32, scale="minmax", scale_dtype=torch.float32)
    calibration = prepare_hessians([HessianStats(hessian=h) for h in hessians], options)
    solved = nested_solve(weight, calibration, options)
    diagonal = torch.stack([f[0, 0] for f in calibration.factors]).double()
    assert diagonal.std() / diagonal.mean() > 0.01  # the widths do differ
    values = (torch.stack([levels(b, 8, slicing) for b in BALANCED]).double() - 128) * solved.scales.double()[
        :, :1, None
    ]
    error = weight[:, 0].double()[:, None, None] - values  # [rows, K, 256]
    cost = (torch.tensor(list(BALANCED.values()))[:, None] * error**2 / diagonal[:, None] ** 2).sum(1)
    chosen = cost.gather(1, solved.codes[:, :1].long()).squeeze(1)
    torch.testing.assert_close(chosen, cost.amin(1), rtol=1e-4, atol=0)
