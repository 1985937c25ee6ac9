"""Planes in host memory: outputs stay, bytes go, and planes come back when a bit-width needs them."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sharded_linear import WHOLE, nested_weight
from test_worker import graph_mode, make_worker  # noqa: F401 - a fixture
from torch import nn

from matquant.errors import UserError
from matquant.formats.packed import LayerSpec
from matquant.formats.planes import NestedPlanes
from matquant.vllm.plane_memory import PlaneMemory
from matquant.vllm.sharded_linear import ShardedNestedLinear, share_equal_parameters
from matquant.vllm.step import StepWidth
from matquant.vllm.worker import begin_step, layer_widths


@pytest.mark.parametrize("counts", [(3, 8), (6, 2, 5, 8), (2, 8, 4, 3, 8), (1, 1, 8, 1, 8)])
def test_planes_go_and_come_back(counts):
    planes = torch.randint(-(2**31), 2**31, (8, 3, 5), dtype=torch.int32)
    before, memory = planes.clone(), PlaneMemory(planes)
    assert memory.resident == 8
    for previous, count in itertools.pairwise((8, *counts)):
        assert memory.keep(count) == (previous != count)
        assert memory.resident == count
        assert planes.untyped_storage().nbytes() == count * 3 * 5 * 4
        assert planes.shape == (8, 3, 5)
        assert torch.equal(planes[:count], before[:count])


def test_more_planes_than_there_are():
    memory = PlaneMemory(torch.zeros(4, 2, dtype=torch.int32))
    assert not memory.keep(8)
    assert memory.resident == 4


def loaded_layer(slicing: str = "msb") -> ShardedNestedLinear:
    weight = nested_weight(slicing=slicing) if slicing != "msb" else nested_weight()
    layer = ShardedNestedLinear("a", LayerSpec.from_weight(weight), {}, WHOLE, num_planes=8, bits=8, prefill=8)
    packed = NestedPlanes.pack(weight)
    layer.planes.copy_(packed.planes)
    layer.scales.copy_(packed.scales)
    for bits, scales in packed.own_scales.items():
        getattr(layer, f"scales{bits}").copy_(scales)
    if layer.zeros is not None:
        layer.zeros.copy_(packed.zeros)
    return layer


def outputs(layer: ShardedNestedLinear, bits: int) -> torch.Tensor:
    layer.set_bits(bits, bits)
    x = torch.linspace(-1, 1, 3 * layer.shard.shape[1]).view(3, -1)
    return layer(x, None)


@pytest.mark.parametrize("kept", [2, 3, 5])
def test_a_layer_computes_the_same_with_fewer_planes(kept):
    layer = loaded_layer()
    before = {bits: outputs(layer, bits) for bits in range(2, 9)}
    layer.memory.keep(layer.format.planes_read(kept))
    for bits in range(2, kept + 1):
        assert torch.equal(outputs(layer, bits), before[bits])
    layer.memory.keep(8)
    assert all(torch.equal(outputs(layer, bits), before[bits]) for bits in before)


def test_a_reader_shares_the_planes_and_has_a_bit_width_of_its_own():
    layer = loaded_layer()
    before = {bits: outputs(layer, bits) for bits in (2, 8)}
    reader = layer.reader(2)
    x = torch.linspace(-1, 1, 3 * layer.shard.shape[1]).view(3, -1)
    assert (layer.bits, reader.bits) == ((8, 8), (2, 2))
    assert reader.planes.data_ptr() == layer.planes.data_ptr()
    assert torch.equal(reader(x, None), before[2])
    assert torch.equal(layer(x, None), before[8])
    reader.load("plane0", torch.zeros(1))  # tensors of the file are ignored
    reader.load_dummy()
    assert torch.equal(layer(x, None), before[8])
    with pytest.raises(UserError, match="a bit-width must be a whole number in 2..8; found 9"):
        layer.reader(9)


def test_equal_parameters_of_draft_and_target_are_shared():
    target, draft = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    draft[0].load_state_dict(target[0].state_dict())
    with torch.no_grad():
        draft[0].bias += 1
    share_equal_parameters(draft, target)
    assert draft[0].weight.data_ptr() == target[0].weight.data_ptr()
    assert draft[0].bias.data_ptr() != target[0].bias.data_ptr()
    assert draft[1].weight.shape == (5, 4)


def widths_by_step(worker: Any, *steps: int | None) -> list[Any]:
    found = []
    for bits in steps:
        begin_step(worker, SimpleNamespace(matquant_step=StepWidth(bits, {"step": bits})))
        found.append([list(layer.bits) for layer in worker.model_runner.model])
    return found


def test_a_step_has_the_bit_width_of_its_requests(make_worker):  # noqa: F811
    worker = make_worker(graph_mode("FULL_AND_PIECEWISE", True))
    worker.set_bits({"a": 5}, 8)
    base = [[5, 8], [4, 4]]
    assert widths_by_step(worker, 3, 3, None, 2, None) == [[[3, 3]] * 2, [[3, 3]] * 2, base, [[2, 2]] * 2, base]
    assert worker.model_runner.cudagraph_manager.graphs["step"] == base
    assert worker.model_runner.captured == 4  # at the start, and once for base, 3 and 2 bits
    assert worker.get_step_state() == {"step": None}
    widths_by_step(worker, 3)
    assert worker.get_bits() == {"a": [5, 8], "b": [4, 4]}  # those of requests that name none
    worker.set_bits(6)
    assert widths_by_step(worker, 3, None) == [[[3, 3]] * 2, [[6, 6]] * 2]
    begin_step(worker, SimpleNamespace())  # vLLM's own scheduler
    assert worker.get_step_state() == {"step": None}


def test_a_worker_moves_planes_and_brings_them_back(make_worker):  # noqa: F811
    worker = make_worker(graph_mode("FULL", True))
    total = worker.keep_planes(8)["total"]
    assert worker.keep_planes(8)["resident"] == total
    captured = worker.model_runner.captured
    assert worker.keep_planes(4)["resident"] == total // 2
    assert worker.model_runner.captured == captured + 1  # addresses have changed
    widths_by_step(worker, 2, 4)
    assert layer_widths(worker.model_runner).plane_bytes()["resident"] == total // 2
    widths_by_step(worker, 6)
    assert layer_widths(worker.model_runner).plane_bytes()["resident"] == total * 6 // 8
    assert worker.model_runner.cudagraph_manager.graphs["step"] == [[6, 6]] * 2
    worker.set_bits(8)
    assert layer_widths(worker.model_runner).plane_bytes()["resident"] == total
    with pytest.raises(UserError, match="planes of 4 bits are not enough: some layers are read at 8 bits"):
        worker.keep_planes(4)
    worker.set_bits(2)
    worker.model_runner.drafter = SimpleNamespace(model=nn.ModuleList([worker.model_runner.model[0].reader(5)]))
    with pytest.raises(UserError, match="some layers are read at 5 bits"):
        worker.keep_planes(3)
    assert layer_widths(worker.model_runner).plane_bytes()["resident"] == total
