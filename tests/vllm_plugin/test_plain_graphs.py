"""Full CUDA graphs of plain steps, in a model runner with the attributes of vLLM's."""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from matquant.vllm import compat, plain_graphs
from matquant.vllm.step_drafts import may_leave_out_drafts

FULL = "full"
Key = tuple[int, int, bool, int]


class Mode:
    """``CUDAGraphMode`` of vLLM."""

    def __init__(self, decode: str = FULL, separate: bool = True) -> None:
        self.decode, self.separate = decode, separate

    def decode_mode(self) -> str:
        return self.decode

    def separate_routine(self) -> bool:
        return self.separate


class Dispatcher:
    """``CudagraphDispatcher`` of vLLM."""

    def __init__(self, length: int, sizes: list[int], mode: Mode) -> None:
        self.uniform_decode_query_len, self.cudagraph_mode = length, mode
        self._bs_to_padded_graph_size = plain_graphs.padded_sizes(sizes)
        self.keys = {self._create_padded_batch_descriptor(size, True, False) for size in sizes}

    def _get_lora_cases(self) -> list[int]:
        return [0, 2]

    def _create_padded_batch_descriptor(self, tokens: int, uniform: bool, lora: bool, loras: int = 0) -> Key:
        padded = self._bs_to_padded_graph_size[tokens]
        assert lora == (loras > 0)
        assert padded % self.uniform_decode_query_len == 0
        return padded, padded // self.uniform_decode_query_len, uniform, loras

    def add_cudagraph_key(self, mode: str, key: Key) -> None:
        assert mode == FULL
        self.keys.add(key)


class Runner:
    """``GPUModelRunner`` of vLLM, with three drafts a step and at most 12 requests."""

    vllm_config: Any = "config"
    sizes: ClassVar[list[int]] = [4, 8, 16, 24]

    def __init__(self, mode: Mode | None = None, length: int = 4) -> None:
        self.uniform_decode_query_len = length
        self.cudagraph_dispatcher: Any = Dispatcher(length, self.sizes, mode or Mode())
        self.compilation_config: Any = SimpleNamespace(
            cudagraph_capture_sizes=self.sizes, pass_config=SimpleNamespace(enable_sp=False)
        )
        self.scheduler_config = SimpleNamespace(max_num_seqs=12)
        self.captured: list[Key] = []

    def _check_and_update_cudagraph_mode(self) -> str:
        return "checked"

    def _determine_batch_execution_and_padding(
        self,
        num_tokens: int,
        num_reqs: int,
        max_num_scheduled_tokens: int,
        use_cascade_attn: bool = False,
        force_uniform_decode: bool | None = None,
    ) -> Key | None:
        """Key of a full graph; None if there is none."""
        uniform = max_num_scheduled_tokens == self.uniform_decode_query_len
        uniform &= num_tokens == max_num_scheduled_tokens * num_reqs
        uniform = uniform if force_uniform_decode is None else force_uniform_decode
        if not uniform or use_cascade_attn:
            return None
        key = self.cudagraph_dispatcher._create_padded_batch_descriptor(num_tokens, True, False)
        return key if key in self.cudagraph_dispatcher.keys else None

    def _warmup_and_capture(self, key: Key) -> None:
        """Capture a graph as vLLM's dummy run does: the step with the number of tokens of the key."""
        length, tokens = self.uniform_decode_query_len, key[0]
        found = self._determine_batch_execution_and_padding(
            num_tokens=tokens, num_reqs=tokens // length, max_num_scheduled_tokens=length, force_uniform_decode=True
        )
        assert found is not None
        assert found[:3] == key[:3]
        self.captured.append(key)


@pytest.fixture
def runner_class(monkeypatch):
    """Hooked class, and whether engines have plain steps."""
    hooked = type("GPUModelRunner", (Runner,), {})
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(CUDAGraphMode=SimpleNamespace(FULL=FULL)))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", SimpleNamespace(GPUModelRunner=hooked))
    compat.hook_plain_steps(lambda config: config == "config")
    return hooked


def test_plain_steps_have_full_graphs_of_their_own(runner_class):
    runner = runner_class()
    before = set(runner.cudagraph_dispatcher.keys)
    assert runner._check_and_update_cudagraph_mode() == "checked"
    added = runner.cudagraph_dispatcher.keys - before
    assert {key[:2] for key in added} == {(size, size) for size in (1, 2, 4, 8)}  # no more than 12 requests
    assert {key[3] for key in added} == {0, 2}
    for key in sorted(runner.cudagraph_dispatcher.keys):
        runner._warmup_and_capture(key)
    assert set(runner.captured) == runner.cudagraph_dispatcher.keys

    def graph(requests: int, length: int, **arguments: Any) -> Any:
        return runner._determine_batch_execution_and_padding(
            num_tokens=requests * length, num_reqs=requests, max_num_scheduled_tokens=length, **arguments
        )

    assert [graph(requests, 1) for requests in (1, 2, 3, 7)] == [(n, n, True, 0) for n in (1, 2, 4, 8)]
    assert graph(2, 4) == (8, 2, True, 0)
    assert graph(9, 1) is None  # more than the largest graph
    assert graph(4, 1, use_cascade_attn=True) is None
    assert graph(4, 1, force_uniform_decode=False) is None  # the capture of a piecewise graph of 4 tokens
    assert (runner.uniform_decode_query_len, runner.cudagraph_dispatcher.uniform_decode_query_len) == (4, 4)


@pytest.mark.parametrize(
    "arguments",
    [{"mode": Mode(decode="none")}, {"mode": Mode(separate=False)}, {"length": 1}],
    ids=["no full graphs", "one set of graphs", "no drafts"],
)
def test_runners_without_full_graphs_of_decoding_get_none(runner_class, arguments):
    runner = runner_class(**arguments)
    before = set(runner.cudagraph_dispatcher.keys)
    runner._check_and_update_cudagraph_mode()
    assert runner.cudagraph_dispatcher.keys == before
    key = runner._determine_batch_execution_and_padding(num_tokens=4, num_reqs=4, max_num_scheduled_tokens=1)
    assert (key is None) == (runner.uniform_decode_query_len != 1)


def test_engines_that_always_draft_get_none(runner_class):
    runner = runner_class()
    runner.vllm_config = "other"
    before = set(runner.cudagraph_dispatcher.keys)
    runner._check_and_update_cudagraph_mode()
    assert runner.cudagraph_dispatcher.keys == before


def test_sequence_parallelism_has_none(runner_class):
    runner = runner_class()
    runner.compilation_config.pass_config.enable_sp = True
    before = set(runner.cudagraph_dispatcher.keys)
    runner._check_and_update_cudagraph_mode()
    assert runner.cudagraph_dispatcher.keys == before


def test_release_without_a_method_is_left_as_it_is(monkeypatch, caplog):
    lacking = type("GPUModelRunner", (), {"_check_and_update_cudagraph_mode": lambda self: "checked"})
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(CUDAGraphMode=SimpleNamespace(FULL=FULL)))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", SimpleNamespace(GPUModelRunner=lacking))
    method = lacking._check_and_update_cudagraph_mode
    compat.hook_plain_steps(lambda _: True)
    assert lacking._check_and_update_cudagraph_mode is method
    assert "this release of vLLM lacks _determine_batch_execution_and_padding" in caplog.text


def test_lengths_come_back_after_an_error(runner_class):
    runner = runner_class()
    runner._check_and_update_cudagraph_mode()
    runner._bs_to_padded_graph_size = runner.cudagraph_dispatcher._bs_to_padded_graph_size
    with contextlib.suppress(ZeroDivisionError), plain_graphs.step_graphs(runner, 2, 2, 1):
        assert runner.uniform_decode_query_len == 1
        raise ZeroDivisionError
    assert runner.uniform_decode_query_len == 4
    assert runner.cudagraph_dispatcher._bs_to_padded_graph_size is runner._bs_to_padded_graph_size


@pytest.mark.parametrize("missing", ["vllm.config", "vllm.v1.worker.gpu_model_runner"])
def test_release_without_the_runner_is_left_as_it_is(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(CUDAGraphMode=None))
    monkeypatch.setitem(sys.modules, missing, None)
    compat.hook_plain_steps(lambda _: True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"speculative_config": None}, False),
        ({"speculative_config": SimpleNamespace(method="eagle")}, False),
        ({"parallel_config": SimpleNamespace(data_parallel_size=2)}, False),
        ({"additional_config": {"matquant": {"speculation": "always"}}}, False),
        ({"scheduler_config": SimpleNamespace(get_scheduler_cls=lambda: object)}, False),
    ],
    ids=["adaptive", "no drafts", "another method", "data-parallel", "always", "another scheduler"],
)
def test_engines_whose_drafts_may_be_left_out(changed, expected):
    scheduler = type("WidthScheduler", (), {"plans_drafts": True})
    config = {
        "speculative_config": SimpleNamespace(method="draft_model"),
        "parallel_config": SimpleNamespace(data_parallel_size=1),
        "additional_config": {"matquant": {"draft_bits": 2}},
        "scheduler_config": SimpleNamespace(get_scheduler_cls=lambda: scheduler),
    }
    assert may_leave_out_drafts(SimpleNamespace(**config | changed)) is expected
