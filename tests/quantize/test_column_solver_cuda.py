"""CUDA column solver on the emulator: its choices equal those of the CPU solver."""

import functools

import pytest
import torch

from matquant.quantize.gptq import column_solver, column_solver_cuda, solver
from matquant.quantize.gptq.code_grid import FROM_RANGE, CodeGrid, ScaleSearchSpace
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians
from matquant.quantize.gptq.options import SolverOptions
from tests.kernels.emulator import compile_kernel, have_compiler, read_source

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]

BALANCED = {2: 1.0, 3: 1.5, 4: 3.0, 6: 12.0, 8: 48.0}
CASES = {  # bit-widths, master bits, slicing, one target for all, Hessians, stretch unless 1
    "five bit-widths": (BALANCED, 8, "msb", False, 1),
    "a Hessian per bit-width": (BALANCED, 8, "msb", False, 5),
    "round, shared target": ({3: 1.0, 4: 1.0, 8: 1.0}, 8, "round", True, 1),
    "one bit-width": ({4: 1.0}, 4, "round", False, 1),
    "six of eight bits": ({2: 1.0, 6: 4.0}, 8, "msb", False, 1),
    "stretched": (BALANCED, 8, "msb", False, 5, 1.25),
    "stretched, high bit-widths only": ({5: 1.0, 7: 4.0}, 7, "msb", False, 1, 1.5),
}


def load(function, defines, device):
    return compile_kernel(read_source(column_solver_cuda.SOURCE), function, defines)


class SolverCase:
    """Random targets whose bit-widths differ about as much as compensated ones do, and a factor that couples columns."""

    def __init__(self, case, out_features=37, columns=32, seed=0):
        weights, self.master_bits, slicing, shared, self.hessians, *stretch = CASES[case]
        self.bits, generator = list(weights), torch.Generator().manual_seed(seed)
        self.lambdas = torch.tensor(list(weights.values()))[:, None] * (
            0.5 + torch.rand(len(weights), columns, generator=generator)
        )
        self.grid = CodeGrid.of(self.bits, self.master_bits, slicing, *stretch)
        spread = torch.tensor([0.3 / 2**b for b in self.bits])[:, None, None]
        noise = torch.randn(len(weights), out_features, columns, generator=generator)
        targets = torch.randn(out_features, columns, generator=generator) * 0.1 + spread * noise
        self.targets = targets[-1:].clone() if shared else targets
        self.targets[:, 5] = 0  # a row of zeros has a scale of 0
        mix = torch.randn(self.hessians, columns, columns, generator=generator) / columns**0.5
        self.hessian = mix @ mix.mT + torch.eye(columns)
        self.factor = torch.linalg.cholesky(self.hessian.inverse(), upper=True)
        self.hessian_diag = 0.5 + torch.rand(columns, generator=generator)

    def scales(self, own):
        """Scales [K, rows] and zero points [rows]; ``own``: the lower bit-widths have shorter ranges."""
        trials = ScaleSearchSpace(torch.tensor([0.9]), torch.tensor([2.0 ** (self.master_bits - 1)]), torch.float16)
        scales, zeros = column_solver.choose_scales(
            self.targets, 0, self.targets.shape[2], self.hessian_diag, self.lambdas, self.grid, trials
        )
        shares = torch.linspace(0.6, 1.0, len(self.bits)) if own else torch.ones(len(self.bits))
        return scales * shares[:, None], zeros


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zero_points", [[128.0], [136.0, 120.0], [FROM_RANGE, 128.0]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_those_of_the_cpu(case, zero_points, dtype):
    problem = SolverCase(case)
    points = torch.tensor(zero_points) * 2.0 ** (problem.master_bits - 8)
    trials = ScaleSearchSpace(torch.linspace(1.0, 0.4, 13), points, dtype)
    given = (problem.targets, 0, 32, problem.hessian_diag, problem.lambdas, problem.grid, trials)
    expected, found = column_solver.choose_scales(*given), column_solver_cuda.choose_scales(*given, load=load)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (expected[0] > 0).sum() == 36


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "own"), [(16, False), (27, False), (27, True)])
def test_solved_codes_are_those_of_the_cpu(case, width, own):
    problem = SolverCase(case)
    scales, zeros = problem.scales(own)
    factor = problem.factor[:, 4 : 4 + width, 4 : 4 + width].contiguous()
    answers = []
    for solve in (column_solver.solve_columns, lambda *given: column_solver_cuda.solve_columns(*given, load=load)):
        codes = torch.full((37, 32), 77, dtype=torch.uint8)
        errors = solve(
            problem.targets.clone(), 4, 4 + width, factor, problem.lambdas, problem.grid, scales, zeros, codes
        )
        answers.append((codes, errors))
    (codes, errors), (found_codes, found_errors) = answers
    assert torch.equal(found_codes, codes)
    assert (codes[:, :4] == 77).all()
    torch.testing.assert_close(found_errors, errors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in CASES if "shared" not in name])
@pytest.mark.parametrize("own", [False, True])
def test_a_pass_makes_the_moves_of_the_cpu(case, own):
    problem = SolverCase(case)
    scales, _ = problem.scales(own)
    gradient = 0.05 * torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(1))
    start = torch.randint(2**problem.master_bits, (37, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    answers = []
    for sweep in (column_solver.descend_columns, lambda *given: column_solver_cuda.descend_columns(*given, load=load)):
        codes = start.clone()
        hessian = problem.hessian[:, 4:28, 4:28].contiguous()
        moves = sweep(gradient, 4, 28, hessian, problem.lambdas, problem.grid, scales, codes)
        answers.append((codes, moves))
    (codes, moves), (found_codes, found_moves) = answers
    assert (codes != start).any()
    assert torch.equal(found_codes, codes)
    torch.testing.assert_close(found_moves, moves, rtol=1e-5, atol=1e-6)


def test_the_columns_of_a_block_fit_the_smallest_shared_memory():
    for widths in range(1, 8):
        columns = column_solver_cuda.max_block_size(widths)
        assert columns >= 64
        assert column_solver_cuda._tile_bytes(widths, columns) <= 99 * 1024


@pytest.mark.parametrize(("columns", "group_size"), [(72, 64), (72, -1), (200, 128), (30, 128), (81, 32)])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_matrix_with_a_short_last_group_is_solved_as_on_the_cpu(monkeypatch, columns, group_size, act_order):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(21, columns, generator=generator) * 0.05
    inputs = torch.randn(3 * columns, columns, generator=generator)
    options = SolverOptions(
        lambdas=BALANCED, group_size=group_size, zero_point_offset=8.0, cd_passes=1, act_order=act_order
    )
    prepared = prepare_hessians([HessianStats(hessian=inputs.T @ inputs / len(inputs))], options)
    expected = solver.solve(weight, prepared, options)
    for name in ("choose_scales", "solve_columns", "descend_columns"):
        monkeypatch.setattr(column_solver, name, functools.partial(getattr(column_solver_cuda, name), load=load))
    monkeypatch.setattr(
        column_solver, "max_block_size", lambda device, widths: column_solver_cuda.max_block_size(widths)
    )
    found = solver.solve(weight, prepared, options)
    assert found.scales.shape == (21, -(-columns // found.format.group_size))
    # Error feedback is summed in another order, and one other choice changes the rest of its row.
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
