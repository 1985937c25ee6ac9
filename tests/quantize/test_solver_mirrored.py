"""Solver with an offset of the zero points, whose grids are mirrored in some groups."""

import pytest
import torch
from solving import BALANCED, layer, solve

from matquant.formats.nested import levels
from matquant.quantize.gptq.hessians import relative_error
from matquant.quantize.gptq.options import SolverOptions


def objective(weight, solved, hessians, weights=BALANCED):
    """sum_k lambda_k tr(E_k H_k E_k^T) in float64."""
    total = 0.0
    for (bits, lam), hessian in zip(weights.items(), hessians, strict=True):
        error = (weight - solved.dequantize(bits)).double()
        total += lam * torch.einsum("ij,jk,ik->", error, hessian.double(), error).item()
    return total


def damped_by(hessian, damp=0.01):
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))


@pytest.mark.parametrize("seed", range(4))
def test_an_offset_costs_normal_weights_little_and_helps_skewed_ones(seed):
    weight, hessian = layer(16, 64, seed=seed)
    damped = [damped_by(hessian)] * len(BALANCED)
    generator = torch.Generator().manual_seed(seed)
    # Long tails, to one side in each group.
    side = torch.randint(2, (16, 2), generator=generator).repeat_interleave(32, 1) * 2 - 1
    skewed = side * 0.05 * (torch.empty(16, 64).exponential_(generator=generator) - 0.5)
    ratios = []
    for given_weight in (weight, skewed):
        plain, moved = (
            solve(
                given_weight, hessian, SolverOptions(lambdas=BALANCED, group_size=32, cd_passes=1, zero_point_offset=o)
            )
            for o in (0.0, 16.0)
        )
        assert (moved.format.zero_point_offset, plain.format.zero_point_offset) == (16.0, 0.0)
        assert (plain.scales >= 0).all()
        assert (moved.scales < 0).any()
        assert (moved.scales > 0).any()
        ratios.append(objective(given_weight, moved, damped) / objective(given_weight, plain, damped))
    assert ratios[0] < 1.02
    assert ratios[1] < 0.9


@pytest.mark.parametrize("columns", [64, 72])
@pytest.mark.parametrize("act_order", [False, True])
def test_mirrored_codes_decode_to_what_the_solver_chose(act_order, columns):
    """Without feedback each stored code has the least cost of all codes, on the grid that the stored scale stands for."""
    weight, hessian = layer(16, columns)
    options = SolverOptions(lambdas=BALANCED, group_size=32, zero_point_offset=8.0, act_order=act_order)
    solved = solve(weight, torch.diag(hessian.diagonal()), options)
    assert (solved.scales < 0).any()
    scale = solved.scales.float().repeat_interleave(32, 1)[:, :columns, None]
    cost = sum(
        lam * (weight[:, :, None] - scale * (levels(b, 8, "msb") - 136)).double() ** 2 for b, lam in BALANCED.items()
    )
    chosen = cost.gather(2, solved.codes.long()[:, :, None]).squeeze(2)
    torch.testing.assert_close(chosen, cost.amin(2), rtol=1e-4, atol=1e-12)
    for bits in BALANCED:
        assert (
            relative_error(weight, solved.dequantize(bits), hessian)
            < {2: 0.3, 3: 0.08, 4: 0.02, 6: 2e-3, 8: 1e-3}[bits]
        )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize("act_order", [False, True])
def test_one_bit_width_alone_is_gptq_however_refined(bits, offset, act_order):
    weight, hessian = layer(16, 128, seed=bits)
    refined = {"lambdas": {bits: 1.0}, "cd_passes": 2, "act_order": act_order, "group_size": 64}
    nested = solve(weight, hessian, SolverOptions(**refined, master_bits=8, zero_point_offset=offset))
    alone = solve(
        weight, hessian, SolverOptions(**refined, master_bits=bits, zero_point_offset=offset * 2.0 ** (bits - 8))
    )
    assert torch.equal(nested.codes >> (8 - bits), alone.codes)
    assert torch.equal(nested.dequantize(bits), alone.dequantize(bits))  # a step is 2^(8 - bits) codes
