"""What the vLLM plugin is made of, as far as it needs no vLLM; tests/serving runs the engine."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats import matgptq
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.packed import LayerSpec, NestedSpec
from matquant.inference import NestedPlanes
from matquant.inference.shard import WeightShard
from matquant.vllm import vllm_ops
from matquant.vllm.bit_widths import Widths, check_graphs, chosen
from matquant.vllm.sharded_linear import ShardedNestedLinear, check_complete
from matquant.vllm.worker import WidthExtension

ROWS, COLUMNS, GROUP = 96, 192, 64


def make_weight(slicing: Any = "msb") -> NestedWeight:
    generator = torch.Generator().manual_seed(0)
    return NestedWeight(
        codes=torch.randint(256, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8),
        scales=torch.randn(ROWS, COLUMNS // GROUP, generator=generator).half(),
        zeros=None,
        format=WeightFormat(
            master_bits=8,
            slicing=slicing,
            zero_point_offset=8.0 if slicing == "msb" else 0.0,
            group_size=GROUP,
            scale_dtype=torch.float16,
        ),
    )


def make_part(cut: WeightShard, planes: int = 8, bits: int = 4, name: str = "layer") -> ShardedNestedLinear:
    spec = LayerSpec.of(make_weight())
    stored = {key.removeprefix("layer."): tensor for key, tensor in spec.tensors("layer", 8).items()}
    return ShardedNestedLinear(name, spec, stored, cut, planes=planes, bits=bits, prefill=bits)


def fill(part: ShardedNestedLinear) -> ShardedNestedLinear:
    packed = NestedPlanes.pack(make_weight())
    part.load("scales", packed.scales)
    for index, plane in enumerate(packed.planes):
        part.load(f"plane{index}", plane)
    return part


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Up to the order of sums in float32."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_hold_halves_of_a_layer(rank):
    x = torch.randn(3, COLUMNS)
    columns = slice(rank * 96, rank * 96 + 96)  # neither a multiple of a tile nor of a group
    by_columns = fill(make_part(WeightShard(ROWS, COLUMNS, ((0, ROWS),), (columns.start, columns.stop))))
    rows = slice(rank * 48, rank * 48 + 48)
    by_rows = fill(make_part(WeightShard(ROWS, COLUMNS, ((rows.start, rows.stop),), (0, COLUMNS))))
    assert by_columns.group_size == 32
    for bits in (2, 4, 8):
        by_columns.set_bits(bits, bits)
        by_rows.set_bits(bits, bits)
        dense = make_weight().dequantize(bits)
        assert_near(by_columns(x[:, columns], None), x[:, columns] @ dense[:, columns].T)
        assert_near(by_rows(x, None), x @ dense[rows].T)


def test_a_compiled_model_reads_the_width_when_it_runs():
    part = fill(make_part(WeightShard.whole(ROWS, COLUMNS)))
    x = torch.randn(2, COLUMNS)
    addresses = [buffer.data_ptr() for buffer in part.buffers()]
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(part, fullgraph=True, backend=backend)
    for bits in (2, 8, 5):
        part.set_bits(bits, bits)
        assert_near(compiled(x, None), x @ make_weight().dequantize(bits).T)
    assert len(graphs) == 1
    assert [buffer.data_ptr() for buffer in part.buffers()] == addresses


def test_fewer_planes_are_kept_than_come():
    part = fill(make_part(WeightShard.whole(ROWS, COLUMNS), planes=3, bits=3))
    check_complete([part])
    assert part.planes.shape[0] == 3
    with pytest.raises(UserError, match="layer: 4 bits cannot be read"):
        part.set_bits(4, 3)
    assert part.widths.tolist() == [3, 3, 1]


def test_published_codes_become_planes():
    weight = make_weight("round")
    about = matgptq.MatGptqSpec(group_size=GROUP, bits=4, scale_dtype=torch.float16)
    spec = matgptq.layer(ROWS, COLUMNS, GROUP, torch.float16)
    stored = {key.removeprefix("layer."): tensor for key, tensor in about.tensors({"layer": spec}).items()}
    cut = WeightShard(ROWS, COLUMNS, ((10, 90),), (96, 192))
    part = ShardedNestedLinear("layer", spec, stored, cut, planes=8, bits=3, prefill=3)
    part.load("qweight", weight.codes)
    part.load("scales", weight.scales)
    check_complete([part])
    x = torch.randn(2, 96)
    assert_near(part(x, None), x @ weight.dequantize(3)[10:90, 96:].T)


def test_tensors_that_are_missing_or_wrong():
    part = make_part(WeightShard.whole(ROWS, COLUMNS))
    with pytest.raises(UserError, match=r"do not hold layer.plane0, layer.plane1, layer.plane2 and 6 more"):
        check_complete([part])
    for wrong in (torch.zeros(2, 3, 32, 4), torch.zeros(1, 3, 32, 4, dtype=torch.int32)):
        with pytest.raises(UserError, match=r"layer.plane0 is .*, and the checkpoint's config says"):
            part.load("plane0", wrong)
    with pytest.raises(UserError, match="layer.plane8 is"):
        part.load("plane8", NestedPlanes.pack(make_weight()).planes[0])


def make_spec(**changes: Any) -> NestedSpec:
    layer = LayerSpec.of(make_weight())
    return NestedSpec(**{"layers": {"a": layer, "b": layer}, "bits": 4, "max_bits": 8} | changes)


def test_widths_of_the_config_and_of_overrides(tmp_path):
    spec = make_spec(layer_bits={"b": 3}, prefill_bits=8)
    assert chosen(spec, {}).decode == {"a": 4, "b": 3}
    assert chosen(spec, {}).of("b") == (3, 8)
    assert chosen(spec, {"bits": 2, "prefill_bits": None}) == Widths(
        bits=2, decode={"a": 2, "b": 2}, prefill=None, max_bits=8
    )
    assert chosen(spec, {"layer_bits": {"a": 7}}).decode == {"a": 7, "b": 3}
    assert chosen(make_spec(bits=8), {"max_bits": 3}).decode == {"a": 3, "b": 3}
    file = tmp_path / "allocation.yaml"
    file.write_text(json.dumps({"widths": {"a": 5, "b": 6}}))
    assert chosen(spec, {"bits": str(file)}).decode == {"a": 5, "b": 6}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"bits": 9}, "bits: a width is a whole number in 2..8; found 9"),
        ({"bits": 6, "max_bits": 5}, "bits: 6 bits are not in this checkpoint"),
        ({"prefill_bits": "8"}, "prefill_bits: a width is a whole number"),
        ({"layer_bits": {"c": 4}}, "bits names c, which is no nested layer"),
    ],
)
def test_widths_that_are_not_there(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        chosen(make_spec(), overrides)


def graphs(name: str, separate: bool) -> Any:
    return SimpleNamespace(name=name, separate_routine=lambda: separate)


def test_prompts_of_another_width_need_graphs_of_their_own():
    same, other = chosen(make_spec(), {}), chosen(make_spec(), {"prefill_bits": 8})
    check_graphs(graphs("PIECEWISE", False), same)
    check_graphs(graphs("FULL_AND_PIECEWISE", True), other)
    check_graphs(graphs("NONE", False), other)
    with pytest.raises(UserError, match="cudagraph_mode=PIECEWISE vLLM has the same CUDA graphs"):
        check_graphs(graphs("PIECEWISE", False), other)


@pytest.mark.parametrize(
    ("mode", "longest", "width"),
    [("NONE", 1, 2), ("NONE", 7, 8), ("FULL", 1, 2), ("PIECEWISE", 1, 8), ("NONE", None, 8)],
)
def test_a_step_is_read_at_the_width_of_what_it_does(monkeypatch, mode, longest, width):
    metadata = {} if longest is None else {"layer": SimpleNamespace(max_query_len=longest)}
    context = SimpleNamespace(cudagraph_runtime_mode=SimpleNamespace(name=mode), attn_metadata=metadata)
    module = SimpleNamespace(is_forward_context_available=lambda: True, get_forward_context=lambda: context)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    assert vllm_ops.width_now(vllm_ops.new_widths(2, 8)) == width
    assert vllm_ops.width_now(vllm_ops.new_widths(3, 3)) == 3


class Runner:
    """What ``worker`` uses of vLLM's model runner, with graphs that it captures by itself."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.captured = model, 0
        self.compilation_config = SimpleNamespace(cudagraph_mode=graphs("FULL_AND_PIECEWISE", True))
        self.device = torch.device("cuda")
        self.cudagraph_manager = SimpleNamespace(graphs={})
        self.capture_model()

    def get_model(self) -> torch.nn.Module:
        return self.model

    def capture_model(self) -> None:
        self.captured += 1
        assert not self.cudagraph_manager.graphs
        self.cudagraph_manager.graphs["step"] = [part.widths[:2].tolist() for part in self.model]


def test_each_choice_of_widths_has_its_own_graphs(monkeypatch):
    wrapper = SimpleNamespace(CUDAGraphWrapper=SimpleNamespace(_all_instances=set()))
    monkeypatch.setitem(sys.modules, "vllm.compilation.cuda_graph", wrapper)
    worker: Any = WidthExtension()
    worker.model_runner = Runner(
        torch.nn.ModuleList(make_part(WeightShard.whole(ROWS, COLUMNS), name=name) for name in "ab")
    )
    for bits, widths, captured in (
        (2, [[2, 2], [2, 2]], 2),
        ({"a": 3}, [[3, 3], [2, 2]], 3),
        (2, [[2, 2], [2, 2]], 3),
        (2, [[2, 2], [2, 2]], 3),
        (4, [[4, 4], [4, 4]], 3),
    ):
        found = worker.set_bits(bits)
        assert list(found.values()) == worker.model_runner.cudagraph_manager.graphs["step"] == widths
        assert worker.model_runner.captured == captured
    with pytest.raises(UserError, match="bits names c"):
        worker.set_bits({"c": 4})
    assert list(worker.get_bits().values()) == [[4, 4], [4, 4]]
    assert worker.set_bits(2, 8) == {"a": [2, 8], "b": [2, 8]}
