"""Change of bit-widths in a worker of vLLM, with a model runner in place of vLLM's."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sharded_linear import WHOLE, nested_weight

from matquant.errors import UserError
from matquant.formats.bit_choice import BitChoice
from matquant.formats.packed import LayerSpec
from matquant.vllm.cuda_graphs import check_graph_mode
from matquant.vllm.sharded_linear import ShardedNestedLinear
from matquant.vllm.worker import WidthExtension


def graph_mode(name: str, separate_routine: bool) -> Any:
    return SimpleNamespace(name=name, separate_routine=lambda: separate_routine)


class Runner:
    """Part of vLLM's model runner that the worker uses; its graphs record the bit-widths of their capture."""

    def __init__(self, model: torch.nn.ModuleList, mode: Any) -> None:
        self.model, self.captured = model, 0
        self.compilation_config = SimpleNamespace(cudagraph_mode=mode)
        self.device = torch.device("cuda")
        self.cudagraph_manager = SimpleNamespace(graphs={})
        self.capture_model()

    def get_model(self) -> torch.nn.Module:
        return self.model

    def capture_model(self) -> None:
        self.captured += 1
        assert not self.cudagraph_manager.graphs
        self.cudagraph_manager.graphs["step"] = [list(layer.bits) for layer in self.model]


@pytest.fixture
def make_worker(monkeypatch):
    wrapper = SimpleNamespace(CUDAGraphWrapper=SimpleNamespace(_all_instances=set()))
    breakable = SimpleNamespace(BreakableCUDAGraphWrapper=SimpleNamespace(_all_instances=set()))
    monkeypatch.setitem(sys.modules, "vllm.compilation.cuda_graph", wrapper)
    monkeypatch.setitem(sys.modules, "vllm.compilation.breakable_cudagraph", breakable)

    def make(mode: Any) -> Any:
        worker: Any = WidthExtension()
        spec = LayerSpec.from_weight(nested_weight())
        worker.model_runner = Runner(
            torch.nn.ModuleList(
                ShardedNestedLinear(name, spec, {}, WHOLE, num_planes=8, bits=4, prefill=4) for name in "ab"
            ),
            mode,
        )
        return worker

    return make


def test_each_choice_of_bits_has_its_own_graphs(make_worker):
    worker = make_worker(graph_mode("FULL_AND_PIECEWISE", True))
    for bits, expected, captured in (
        (2, [[2, 2], [2, 2]], 2),
        ({"a": 3}, [[3, 3], [2, 2]], 3),
        (2, [[2, 2], [2, 2]], 3),
        (2, [[2, 2], [2, 2]], 3),
        (4, [[4, 4], [4, 4]], 3),
    ):
        found = worker.set_bits(bits)
        assert list(found.values()) == worker.model_runner.cudagraph_manager.graphs["step"] == expected
        assert worker.model_runner.captured == captured
    assert worker.set_bits(2, 8) == worker.get_bits() == {"a": [2, 8], "b": [2, 8]}


def test_bits_from_a_file(make_worker, tmp_path):
    file = tmp_path / "allocation.yaml"
    file.write_text(json.dumps({"bits": {"a": 5, "b": 6}}))
    assert make_worker(graph_mode("NONE", False)).set_bits(str(file)) == {"a": [5, 5], "b": [6, 6]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"c": 4},), "layers that are no nested layers of this model: c"),
        ((9,), "bits: a bit-width must be a whole number in 2..8; found 9"),
        ((4, 9), "a: a bit-width must be a whole number in 2..8; found 9"),
        ((2, 8), "cudagraph_mode=PIECEWISE vLLM uses the same CUDA graphs"),
    ],
)
def test_unavailable_bits_raise_and_change_nothing(make_worker, arguments, message):
    worker = make_worker(graph_mode("PIECEWISE", False))
    with pytest.raises(UserError, match=message):
        worker.set_bits(*arguments)
    assert worker.get_bits() == {"a": [4, 4], "b": [4, 4]}


def test_model_without_nested_layers_raises(make_worker):
    worker = make_worker(graph_mode("NONE", False))
    worker.model_runner.model = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError, match="no nested layers"):
        worker.set_bits(4)


def test_different_prefill_bits_need_separate_graphs():
    same = BitChoice(bits=4, layer_bits={}, prefill_bits=None, max_bits=8)
    other = BitChoice(bits=4, layer_bits={}, prefill_bits=8, max_bits=8)
    check_graph_mode(graph_mode("PIECEWISE", False), same)
    check_graph_mode(graph_mode("FULL_AND_PIECEWISE", True), other)
    check_graph_mode(graph_mode("NONE", False), other)
    with pytest.raises(UserError, match="cudagraph_mode=PIECEWISE vLLM uses the same CUDA graphs"):
        check_graph_mode(graph_mode("PIECEWISE", False), other)
