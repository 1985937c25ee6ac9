"""Scales of single bit-widths: their closed form, and codes that are chosen with them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.formats.groups import expand_groups, group_count
from matquant.formats.nested import levels
from matquant.quantize.gptq import column_solver
from matquant.quantize.gptq.code_grid import CodeGrid
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.scale_refit import refit_scales
from matquant.quantize.gptq.solver import solve

WEIGHTS = {2: 1.0, 3: 4.0, 4: 16.0, 6: 256.0, 8: 4096.0}


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.2 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator) * 0.05, 2 * inputs.T @ inputs / len(inputs)


@settings(max_examples=25, deadline=None)
@given(columns=st.integers(3, 40), group_size=st.integers(1, 40), weighted=st.booleans(), seed=st.integers(0, 100))
def test_refitted_scales_are_the_least_squares_solution(columns, group_size, weighted, seed):
    group_size = min(group_size, columns)
    target, hessian = problem(5, columns, seed)
    scales = torch.full((5, group_count(columns, group_size)), 0.01)
    values = target / 0.02 + torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    found = refit_scales(values, target, hessian if weighted else None, scales, group_size)
    root = torch.linalg.cholesky(hessian.double(), upper=True) if weighted else torch.eye(columns, dtype=torch.float64)
    for row in range(5):
        design = torch.zeros(columns, scales.shape[1], dtype=torch.float64)
        design[torch.arange(columns), torch.arange(columns) // group_size] = values[row].double()
        best = torch.linalg.lstsq(root @ design, (root @ target[row].double())[:, None]).solution[:, 0]
        if (best > 0).all():
            costs = [
                (root @ (target[row].double() - design @ one)).square().sum() for one in (found[row].double(), best)
            ]
            # Normal equations in float32: the solution is off by about epsilon times their condition number.
            off = torch.finfo(torch.float32).eps * torch.linalg.cond((root @ design).T @ (root @ design))
            energy = (root @ target[row].double()).square().sum()
            assert costs[0] <= costs[1] * (1 + 1e-4) + 1e-12 + off**2 * energy
        else:
            assert (found[row] > 0).all()


def test_codes_are_the_best_of_all_codes_for_scales_of_each_bit_width():
    bits, rows, columns = tuple(WEIGHTS), 40, 24
    targets = torch.stack([problem(rows, columns, seed)[0] for seed in range(len(bits))])
    targets = targets[:1] + 0.1 * targets
    scales = torch.rand(len(bits), rows, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-3
    scales[:, 7] = 0
    zeros = torch.full((rows,), 136.0)
    lambdas = torch.tensor(list(WEIGHTS.values()))[:, None].expand(-1, columns).contiguous()
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    identity = torch.eye(columns)[None]
    column_solver.solve_columns(
        targets.clone(), 0, columns, identity, lambdas, CodeGrid.of(bits, 8, "msb"), scales, zeros, codes
    )
    values = torch.stack([levels(b, 8, "msb") for b in bits])[:, None] - zeros[None, :, None]  # [K, rows, 256]
    values = values * scales[:, :, None]
    costs = (lambdas[:, :1, None, None] * (targets[:, :, :, None] - values[:, :, None]) ** 2).double().sum(0)
    chosen = costs.gather(2, codes.long()[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, costs.min(2).values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [128, 72])
def test_own_scales_lower_the_errors_of_their_bit_widths(symmetric, act_order, columns):
    weight, hessian = problem(32, columns)
    base = SolverOptions(
        lambdas={2: 1.0, 4: 16.0, 8: 4096.0},
        group_size=64,
        symmetric=symmetric,
        zero_point_offset=8.0 if symmetric else 0.0,
        act_order=act_order,
        cd_passes=1,
    )
    own = dataclasses.replace(base, scale_bits=(2, 3, 4))
    prepared = prepare_hessians([HessianStats(hessian=hessian)], base)
    shared, fitted = solve(weight, prepared, base), solve(weight, prepared, own)
    assert shared.own_scales == {}
    assert list(fitted.own_scales) == [2, 3, 4]
    assert fitted.format.scale_bits == (2, 3, 4)
    for bits in (2, 3, 4):  # 3 bits are not in the objective, and have scales all the same
        before, after = (relative_error(weight, one.dequantize(bits), hessian) for one in (shared, fitted))
        assert after < before
    assert relative_error(weight, fitted.dequantize(8), hessian) < 0.01
    rescaled = fitted.for_bits(2)
    table = levels(2, 8, "msb")[fitted.codes.int()]
    zeros = 136.0 if symmetric else expand_groups(fitted.zeros.float(), columns, 64)
    dense = (table - zeros) * expand_groups(fitted.own_scales[2].float(), columns, 64)
    assert torch.equal(rescaled.dequantize(2), fitted.dequantize(2))
    torch.testing.assert_close(fitted.dequantize(2), dense)


def test_a_layer_without_data_has_own_scales_too():
    weight, _ = problem(16, 64)
    options = SolverOptions(lambdas=WEIGHTS, group_size=64, zero_point_offset=8.0, scale_bits=(2,))
    fitted = solve(weight, None, options)
    with_base = dataclasses.replace(fitted, own_scales={2: fitted.scales})
    assert (weight - fitted.dequantize(2)).norm() < (weight - with_base.dequantize(2)).norm()
