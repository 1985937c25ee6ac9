"""The compiled choice of codes is that of trying all codes, in the same float32 arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.formats.nested import levels
from matquant.quantize.gptq import column_solver, column_solver_cpu
from matquant.quantize.gptq.code_grid import CodeGrid

F32 = np.float32
LANES = column_solver_cpu._LANES


def best_codes(u, lam, widths, master_bits, slicing, stretch):
    """The compiled choice for targets u [K, n] in units of a code, and its cost: [n] each."""
    grid, (count, n) = CodeGrid.of(widths, master_bits, slicing, stretch), u.shape
    lanes, weight = np.zeros((2, count, LANES), dtype=F32)
    lanes[:, :n], weight[:, :n] = u, lam
    codes, cost, scratch = (
        np.full(LANES, np.nan, F32),
        np.full(LANES, np.nan, F32),
        np.zeros((column_solver_cpu.scratch_rows(count), LANES), F32),
    )
    column_solver_cpu.best_codes(lanes, weight, column_solver.compiled_grid(grid), scratch, codes, cost)
    return codes[:n], cost[:n]


def costs_of_all(u, lam, widths, master_bits, slicing, stretch):
    """float32 [n, 2^M]."""
    table = torch.stack([levels(b, master_bits, slicing, stretch) for b in widths]).float().numpy()
    cost = np.zeros((u.shape[1], table.shape[1]), dtype=F32)
    for k in range(len(widths)):
        error = u[k][:, None] - table[k]
        cost = cost + lam[k][:, None] * error * error
    return cost


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    master_bits=st.integers(2, 8),
    kind=st.sampled_from([("msb", 1.0), ("msb", 1.25), ("msb", 1.5), ("round", 1.0)]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_best_of_all(data, master_bits, kind, spread, seed):
    widths = sorted(data.draw(st.sets(st.integers(2, master_bits), min_size=1)))
    generator = np.random.default_rng(seed)
    n = LANES - 1
    lam = np.exp2(generator.uniform(-10, 10, (len(widths), n))).astype(F32)
    centre = generator.uniform(-0.2, 1.2, n) * 2**master_bits
    u = (centre + spread * generator.standard_normal((len(widths), n))).astype(F32)
    codes, cost = best_codes(u, lam, widths, master_bits, *kind)
    every = costs_of_all(u, lam, widths, master_bits, *kind)
    chosen = np.take_along_axis(every, codes.astype(int)[:, None], 1)[:, 0]
    # Targets relative to a cell's centre are rounded once more. A rounding of d changes a cost l e^2 by
    # 2 l e d <= r l e^2 + l d^2 / r.
    relative, rounding = 1e-5, 2.0 ** (master_bits - 23) * (kind[1] != 1)
    allowed = relative * chosen + lam.sum(0) * rounding**2 / relative
    assert (chosen - every.min(1) <= allowed).all()  # but for ties that rounding makes
    assert (np.abs(cost - chosen) <= allowed).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from([("msb", 1.0), ("msb", 1.25), ("round", 1.0)]), seed=st.integers(0, 2**31))
def test_bits_that_no_width_sees_follow_the_weight(data, kind, seed):
    widths = sorted(data.draw(st.sets(st.integers(2, 7), min_size=1)))
    u = np.random.default_rng(seed).uniform(-10, 270, (1, LANES)).astype(F32).repeat(len(widths), 0)
    codes, _ = best_codes(u, np.ones_like(u), widths, 8, *kind)
    every = costs_of_all(u, np.ones_like(u), widths, 8, *kind)
    stretched = max(widths) > 4  # else the codes follow the strict grid, as no bit-width sees the stretch
    distance = np.abs(u[0][:, None] - levels(8, 8, kind[0], kind[1] if stretched else 1.0).numpy())
    least = np.where(every == every[np.arange(LANES), codes.astype(int)][:, None], distance, np.inf)
    np.testing.assert_array_equal(distance[np.arange(LANES), codes.astype(int)], least.min(1))


@pytest.mark.parametrize(("dtype", "bits", "exponent"), [(torch.float16, 10, -14), (torch.bfloat16, 7, -126)])
def test_round_scale_is_the_storage_dtypes_rounding(dtype, bits, exponent):
    values = torch.cat([torch.rand(2000), torch.rand(2000) * 1e-4, torch.rand(500) * 1e-7, torch.tensor([0.0, 3.5])])
    ours = [column_solver_cpu.round_scale(F32(v), bits, exponent) for v in values.tolist()]
    assert ours == values.to(dtype).float().tolist()
