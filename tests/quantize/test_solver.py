"""The solver against plain re-implementations of the published algorithms, and its properties."""

import dataclasses
import itertools

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solving import BALANCED, layer, solve

from matquant.errors import UserError
from matquant.formats.nested import levels
from matquant.quantize.gptq import column_solver_cpu, solver
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve as nested_solve


def minmax(group, bits, master_bits=None):
    """Symmetric min-max scales of [rows, columns] for a highest width of ``bits``, rounded as stored."""
    drop = (master_bits or bits) - bits
    return (group.abs().amax(1) * 2 / (2**bits - 1) / 2**drop).half().float()


def textbook(weight, hessian, weights, master_bits, slicing, group_size, shared, damp=0.01):
    """GPTQ column by column over all widths, every candidate tried; no blocks, no pruning, float64 feedback."""
    out_features, columns = weight.shape
    damped = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    table = torch.stack([levels(b, master_bits, slicing) for b in weights]).double()
    lam = torch.tensor(list(weights.values()), dtype=torch.float64)
    targets = weight.double().repeat(1 if shared else len(weights), 1, 1)
    codes = torch.zeros(out_features, columns, dtype=torch.uint8)
    scales = torch.zeros(out_features, -(-columns // group_size))
    costs = []
    for j in range(columns):
        if j % group_size == 0:
            scales[:, j // group_size] = minmax(targets[-1, :, j : j + group_size].float(), max(weights), master_bits)
        values = (table - 2 ** (master_bits - 1))[None] * scales[:, j // group_size, None, None].double()
        t = targets[:, :, j].T.expand(out_features, len(weights))
        cost = (lam[:, None] * (t[:, :, None] - values) ** 2).sum(1)
        q = cost.argmin(1)
        costs.append(cost)
        chosen = values.gather(2, q[:, None, None].expand(-1, len(weights), 1)).squeeze(2)
        error = (t - chosen).mean(1, keepdim=True) if shared else t - chosen
        targets[:, :, j:] -= (error.T[:, :, None] / upper[j, j]) * upper[j, j:]
        codes[:, j] = q.to(torch.uint8)
    return codes, scales, torch.stack(costs, 1)


def assert_same_choices(solution, expected, costs):
    """Equal codes, but for ties that float32 and float64 see differently."""
    differs = solution.codes != expected
    assert differs.float().mean() < 0.002
    rows, columns = differs.nonzero(as_tuple=True)
    first = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        first.setdefault(row, column)
    for row, column in first.items():  # later columns of a row see another feedback
        ours, theirs = int(solution.codes[row, column]), int(expected[row, column])
        assert costs[row, column, ours].item() == pytest.approx(costs[row, column, theirs].item(), rel=1e-3)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("slicing", ["msb", "round"])
@pytest.mark.parametrize("shared", [False, True])
def test_codes_are_the_textbooks(group_size, block_size, slicing, shared):
    weight, hessian = layer(seed=group_size)
    expected, scales, costs = textbook(weight, hessian, BALANCED, 8, slicing, group_size, shared)
    options = SolverOptions(
        lambdas=BALANCED,
        slicing=slicing,
        error_feedback="mean" if shared else "per_bit",
        group_size=group_size,
        block_size=block_size,
        scale="minmax",
    )
    solution = solve(weight, hessian, options)
    torch.testing.assert_close(solution.scales.float(), scales, rtol=2e-3, atol=0)
    assert_same_choices(solution, expected, costs)


@pytest.mark.parametrize(
    ("columns", "group_size", "block_size"),
    [
        (72, 64, 128),
        (72, 128, 128),
        (72, -1, 32),
        (200, 128, 128),
        (200, 128, 96),
        (200, -1, 128),
        (30, 32, 7),
        (81, 32, 48),
    ],
)
@pytest.mark.parametrize(("slicing", "shared"), [("msb", False), ("round", True)])
def test_a_short_last_group_is_solved_as_in_the_textbook(columns, group_size, block_size, slicing, shared):
    weight, hessian = layer(in_features=columns, seed=columns)
    size = columns if group_size == -1 else min(group_size, columns)
    expected, scales, costs = textbook(weight, hessian, BALANCED, 8, slicing, size, shared)
    options = SolverOptions(
        lambdas=BALANCED,
        slicing=slicing,
        error_feedback="mean" if shared else "per_bit",
        group_size=group_size,
        block_size=block_size,
        scale="minmax",
    )
    solution = solve(weight, hessian, options)
    assert solution.format.group_size == size
    torch.testing.assert_close(solution.scales.float(), scales, rtol=2e-3, atol=0)
    assert_same_choices(solution, expected, costs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_one_bit_width_is_the_textbooks(bits):
    weight, hessian = layer(seed=bits)
    expected, _, costs = textbook(weight, hessian, {bits: 1.0}, bits, "round", 64, shared=False)
    options = SolverOptions(lambdas={bits: 1.0}, master_bits=bits, slicing="round", group_size=64, scale="minmax")
    assert_same_choices(solve(weight, hessian, options), expected, costs)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    weights=st.dictionaries(st.integers(2, 8), st.floats(0.01, 100), min_size=1),
    damp=st.floats(0.001, 0.5),
    slicing=st.sampled_from(["msb", "round"]),
)
def test_codes_are_the_textbooks_for_any_objective(seed, weights, damp, slicing):
    weight, hessian = layer(4, 32, seed=seed)
    weights = dict(sorted(weights.items()))
    expected, _, costs = textbook(weight, hessian, weights, 8, slicing, 32, shared=False, damp=damp)
    options = SolverOptions(lambdas=weights, slicing=slicing, group_size=32, scale="minmax", damp=damp)
    solution = solve(weight, hessian, options)
    # Codes that differ in bits no width sees, or by a tie, cost the same where they first differ.
    codes = solution.codes.int()
    differs = codes != expected
    for row in differs.any(1).nonzero().flatten().tolist():
        column = int(differs[row].nonzero()[0])
        ours, theirs = costs[row, column, codes[row, column]], costs[row, column, expected[row, column].int()]
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", ["minmax", "search"])
def test_one_bit_width_alone_is_gptq_on_the_same_grid(bits, scale):
    """A parent whose objective names one width has the slice that a model of that width alone has."""
    weight, hessian = layer(16, 128, seed=3)
    options = {"lambdas": {bits: 1.0}, "scale": scale, "cd_passes": 1}
    nested = solve(weight, hessian, SolverOptions(**options, master_bits=8))
    alone = solve(weight, hessian, SolverOptions(**options, master_bits=bits))
    assert torch.equal(nested.codes >> (8 - bits), alone.codes)
    assert torch.equal(nested.dequantize(bits), alone.dequantize(bits))


def test_permuting_rows_permutes_codes():
    weight, hessian = layer(16, 64)
    options = SolverOptions(lambdas=BALANCED, group_size=32, cd_passes=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    whole, permuted = solve(weight, hessian, options), solve(weight[order], hessian, options)
    assert torch.equal(whole.codes[order], permuted.codes)
    assert torch.equal(whole.scales[order], permuted.scales)


def test_scaling_the_weight_scales_the_scales_only():
    weight, hessian = layer(8, 64)
    options = SolverOptions(lambdas=BALANCED, group_size=64, cd_passes=1, scale_dtype=torch.float32)
    one, eight = solve(weight, hessian, options), solve(weight * 8, hessian, options)
    assert torch.equal(one.codes, eight.codes)
    assert torch.equal(one.scales * 8, eight.scales)


@pytest.mark.parametrize(("columns", "group_size"), [(128, 32), (128, -1), (136, 64), (200, 128)])
def test_act_order_keeps_groups_whole_and_helps(columns, group_size):
    weight, hessian = layer(16, columns)
    decay = torch.logspace(0, -1.5, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    hessian = hessian * decay[:, None] * decay
    plain = SolverOptions(lambdas={3: 1.0}, master_bits=8, group_size=group_size, scale="minmax")
    ordered = SolverOptions(lambdas={3: 1.0}, master_bits=8, group_size=group_size, scale="minmax", act_order=True)
    errors = [relative_error(weight, solve(weight, hessian, o).dequantize(3), hessian) for o in (plain, ordered)]
    assert errors[1] < errors[0]


def test_act_order_with_an_already_ordered_hessian_changes_nothing():
    weight, hessian = layer(8, 64)
    decay = torch.logspace(1, -1, 64)
    hessian = torch.diag(decay) + 0.01 * hessian
    hessian.diagonal().copy_(decay)
    results = [
        solve(weight, hessian, SolverOptions(lambdas=BALANCED, group_size=32, act_order=order))
        for order in (False, True)
    ]
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scales, results[1].scales)


def test_zero_points_help_a_shifted_weight():
    weight, hessian = layer(8, 64)
    weight = weight + 0.1
    errors = [
        relative_error(weight, solve(weight, hessian, o).dequantize(4), hessian)
        for o in (SolverOptions(lambdas=BALANCED, group_size=32, symmetric=s) for s in (True, False))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), slicing=st.sampled_from(["msb", "round"]), columns=st.sampled_from([32, 40, 71]))
def test_a_sweep_never_raises_the_objective(seed, slicing, columns):
    weight, hessian = layer(4, columns, seed=seed)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    costs = []
    for passes in (0, 1, 2, 4):
        options = SolverOptions(lambdas=BALANCED, slicing=slicing, group_size=32, cd_passes=passes)
        solution = solve(weight, hessian, options)
        costs.append(sum(lam * relative_error(weight, solution.dequantize(b), damped) for b, lam in BALANCED.items()))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("columns", [32, 41])
def test_a_sweep_ends_where_no_single_code_helps(columns):
    weight, hessian = layer(2, columns, seed=5)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)).double()
    options = SolverOptions(lambdas=BALANCED, group_size=32, cd_passes=30)
    solution = solve(weight, hessian, options)

    def cost(codes):
        changed = dataclasses.replace(solution, codes=codes)
        errors = [(weight - changed.dequantize(b)).double() for b in BALANCED]
        return sum(lam * (e @ damped * e).sum(1) for lam, e in zip(BALANCED.values(), errors, strict=True))

    best = cost(solution.codes)
    for column in range(0, columns, 5):
        for code in range(256):
            codes = solution.codes.clone()
            codes[:, column] = code
            assert (cost(codes) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize(("columns", "group_size"), [(72, 32), (200, 128), (30, -1)])
def test_rounding_to_nearest_with_a_short_last_group(columns, group_size):
    weight, _ = layer(8, columns)
    size = columns if group_size == -1 else group_size
    options = SolverOptions(lambdas={4: 1.0}, master_bits=4, slicing="round", group_size=group_size, scale="minmax")
    expected = []
    for group in weight.split(size, dim=1):
        scales = minmax(group, 4)[:, None]
        expected.append((group / scales + 8).round().clamp(0, 15))
    assert torch.equal(solve(weight, None, options).codes, torch.cat(expected, 1).to(torch.uint8))


def test_rounding_to_nearest_is_the_nearest_code():
    weight, _ = layer(8, 64)
    options = SolverOptions(lambdas={4: 1.0}, master_bits=4, slicing="round", group_size=32, scale="minmax")
    ours = solve(weight, None, options)
    scales = minmax(weight.view(-1, 32), 4).view(8, 2)
    expected = (weight.view(8, 2, 32) / scales[:, :, None] + 8).round().clamp(0, 15).view(8, 64)
    assert torch.equal(ours.codes, expected.to(torch.uint8))


def test_a_singular_hessian_grows_its_damping_and_says_so():
    weight, _ = layer(4, 32)
    direction = torch.ones(32, 1)
    hessian = direction @ direction.T - 1e-2 * torch.eye(32)
    options = SolverOptions(lambdas=BALANCED, group_size=32, damp=0.001)
    calibration = prepare_hessians([HessianStats(hessian=hessian)], options, "layer x")
    assert "layer x" in calibration.notes[0]
    assert "damping grew from 0.001" in calibration.notes[0]
    assert torch.isfinite(nested_solve(weight, calibration, options).dequantize(2)).all()


def test_a_hessian_that_is_not_finite_is_refused():
    _, hessian = layer(4, 32)
    hessian[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer x hold NaN"):
        prepare_hessians([HessianStats(hessian=hessian)], SolverOptions(lambdas=BALANCED, group_size=32), "layer x")


def test_dead_inputs_and_groups_of_zeros_are_harmless():
    weight, hessian = layer(4, 64)
    hessian[:, 5] = hessian[5] = 0
    weight[1, 32:] = 0
    solution = solve(weight, hessian, SolverOptions(lambdas=BALANCED, group_size=32))
    assert torch.isfinite(solution.dequantize(2)).all()
    relative = relative_error(weight, solution.dequantize(8), hessian)
    assert relative < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_keep_the_models_dtype_and_choices_use_the_stored_values(dtype):
    weight, hessian = layer(8, 64)
    options = SolverOptions(lambdas={8: 1.0}, group_size=32, scale="minmax", scale_dtype=dtype)
    solution = solve(weight, hessian * 0 + torch.eye(64), options)
    assert solution.scales.dtype == dtype
    # Without feedback every code is the nearest on the stored grid.
    inside = solution.codes.gt(0) & solution.codes.lt(255)
    half_step = solution.scales.float().repeat_interleave(32, 1) / 2
    assert ((weight - solution.dequantize(8)).abs() <= half_step * 1.001)[inside].all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_matrix_in_parts_of_its_rows_is_the_same(monkeypatch, symmetric):
    weight, hessian = layer(70, 128)
    options = SolverOptions(lambdas=BALANCED, group_size=32, symmetric=symmetric, cd_passes=1)
    whole = solve(weight, hessian, options)
    monkeypatch.setattr(solver, "MAX_WEIGHTS_AT_ONCE", 33 * 128)
    parts = solve(weight, hessian, options)
    assert parts.codes.shape == whole.codes.shape
    # A product of fewer rows may be summed in another order, and one other choice changes the rest of its row.
    assert (parts.codes != whole.codes).float().mean() < 0.01
    for bits in BALANCED:
        assert relative_error(weight, parts.dequantize(bits), hessian) == pytest.approx(
            relative_error(weight, whole.dequantize(bits), hessian), rel=1e-3
        )


@pytest.mark.parametrize("strided", ["transposed", "every other column", "every other row"])
@pytest.mark.parametrize(("feedback", "calibrated"), [("per_bit", True), ("mean", True), ("per_bit", False)])
def test_the_layout_of_a_weight_changes_nothing_and_compiles_nothing(strided, feedback, calibrated):
    """Weights of GPT-2 and of fused experts are transposed; the compiled solver would be compiled anew for them."""
    weight, hessian = layer()
    view = {
        "transposed": weight.T.contiguous().T,
        "every other column": weight.repeat_interleave(2, 1)[:, ::2],
        "every other row": weight.repeat_interleave(2, 0)[::2],
    }[strided]
    options = SolverOptions(lambdas={8: 1.0} if feedback == "per_bit" else BALANCED, error_feedback=feedback)
    hessian = hessian if calibrated else None
    expected = solve(weight, hessian, options)
    compiled = [column_solver_cpu.choose_scales, column_solver_cpu.solve_columns, column_solver_cpu.descend_columns]
    before = [len(function.signatures) for function in compiled]
    found = solve(view, hessian, options)
    assert [len(function.signatures) for function in compiled] == before
    torch.testing.assert_close(found.scales, expected.scales)
    assert (found.codes == expected.codes).float().mean() > 0.99


@pytest.mark.parametrize("feedback", ["per_bit", "mean"])
def test_the_number_of_threads_changes_nothing(feedback):
    weight, hessian = layer(33, 128)
    options = SolverOptions(
        lambdas=BALANCED, error_feedback=feedback, group_size=32, zero_point_offset=8.0, cd_passes=2
    )
    before = numba.get_num_threads()
    if before < 2:
        pytest.skip("numba has one thread")
    solutions = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            solutions.append(solve(weight, hessian, options))
    finally:
        numba.set_num_threads(before)
    assert torch.equal(solutions[0].codes, solutions[1].codes)
    assert torch.equal(solutions[0].scales, solutions[1].scales)
