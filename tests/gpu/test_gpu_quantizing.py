"""Quantizing and refining on a GPU. Skipped without an NVIDIA GPU and CuPy."""

import pytest
import torch
from on_gpu import NEEDS_GPU, activations

from matquant.calibration import hessian
from matquant.models.activation_cache import ActivationCache
from matquant.quantize.gptq.hessians import HessianStats, prepare_hessians, relative_error
from matquant.quantize.gptq.options import SolverOptions
from matquant.quantize.gptq.solver import solve

pytestmark = NEEDS_GPU


@pytest.mark.parametrize(("columns", "group_size"), [(576, 128), (200, 128), (200, -1), (72, 64), (30, 128)])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_short_last_group_is_solved_as_on_the_cpu(columns, group_size, act_order):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(130, columns, generator=generator) * 0.05
    inputs = torch.randn(3 * columns, columns, generator=generator)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    lambdas = {2: 1.0, 4: 4.0, 8: 64.0}
    options = SolverOptions(
        lambdas=lambdas, group_size=group_size, zero_point_offset=8.0, cd_passes=1, act_order=act_order
    )
    there, here = (
        solve(weight.to(device), prepare_hessians([HessianStats(hessian=hessian.to(device))], options), options).to(
            "cpu"
        )
        for device in ("cuda", "cpu")
    )
    assert there.format == here.format
    assert there.scales.shape == here.scales.shape == (130, -(-columns // here.format.group_size))
    torch.testing.assert_close(there.scales[:, :1], here.scales[:, :1])
    # Sums in another order change a few choices, and one other choice changes the rest of its row.
    for bits in lambdas:
        errors = [relative_error(weight, one.dequantize(bits), hessian) for one in (there, here)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_inputs_lose_nothing(dtype, monkeypatch):
    monkeypatch.setattr(hessian, "PANEL_COLUMNS", 192)
    moments = hessian.HessianAccumulator(512, "cuda", asymmetric=True)
    batches = [activations(4, 600, 512, dtype=dtype) * (1 + k) for k in range(3)]
    for full, _, inputs, _ in batches:
        moments.update(inputs, full)
    inputs = torch.cat([batch[2] for batch in batches]).double()
    full = torch.cat([batch[0] for batch in batches]).double()
    square, cross = (2 * left.T @ inputs / len(inputs) for left in (inputs, full - inputs))
    assert (moments.hessian - square).norm() <= 1e-5 * square.norm()
    assert (moments.cross - cross).norm() <= torch.finfo(dtype).eps * cross.norm()


def test_hidden_states_in_the_hosts_memory_are_copied_in_order():
    device = torch.device("cuda")
    states = ActivationCache((64, 256, 512), torch.float16, torch.device("cpu"), device)
    values = activations(64, 256, 512)
    states[0:64] = values
    copied = states.clone()
    for start in range(0, 64, 16):
        rows = slice(start, start + 16)
        for _ in range(5):
            states[rows] = states[rows] + 1
    exact = values
    for _ in range(5):
        exact = exact + 1
    assert torch.equal(states[0:64], exact)
    assert torch.equal(copied[0:64], values)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_captured_passes_of_a_refinement_give_the_gradients_of_eager_ones(kind, tmp_path):
    from architectures import make_model, save
    from packing import Opened

    from matquant.refine.block_passes import BlockPasses, GraphedPasses
    from matquant.refine.slice_model import open_slice_model

    opened = Opened(save(make_model(kind), tmp_path / "model"), tmp_path / "store")
    weights = {n: w for i in range(len(opened.parent.blocks)) for n, w in opened.parent.block(i).items()}
    windows = torch.randint(3, 120, (6, 12), generator=torch.Generator().manual_seed(0))
    with open_slice_model(opened.blocks, weights, windows, 2, torch.device("cuda"), torch.float32) as model:
        graphed = None
        for factor, batch in ((1.0, 0), (1.2, 1), (0.9, 2)):
            scales = {n: (w.scales.float() * factor).requires_grad_() for n, w in model.reader.weights.items()}
            hidden = model.inputs.hidden[model.inputs.rows[batch]]
            eager = BlockPasses(model.reader, 3, model.inputs.kwargs[batch])
            captured = BlockPasses(model.reader, 3, model.inputs.kwargs[batch])
            graphed = graphed or GraphedPasses(captured, hidden, scales, torch.cuda.graph_pool_handle())
            output, expected = graphed.forward(hidden, scales).clone(), eager.forward(hidden, scales)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            gradient = torch.randn_like(output)
            found, gradients = graphed.backward(gradient), eager.backward(gradient)
            assert found.keys() == gradients.keys()
            for name, one in gradients.items():
                torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5)
