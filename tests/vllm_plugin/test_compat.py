"""Differences between releases of vLLM, with classes in place of vLLM's that have the attributes of old and new releases."""

import dataclasses
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import matquant.vllm
from matquant.errors import UserError
from matquant.vllm import compat


@dataclasses.dataclass
class NewMapper:
    """``WeightsMapper`` of vLLM 0.32."""

    orig_to_new_renaming: list[Any]

    def map_name(self, name: str) -> str | None:
        return f"new.{name}"

    def __or__(self, other: Any) -> list[Any]:
        return [self, other]


@dataclasses.dataclass
class OldMapper:
    """``WeightsMapper`` of vLLM 0.24."""

    orig_to_new_renamings: list[Any]

    def _map_name(self, name: str) -> str | None:
        return f"old.{name}"


@pytest.mark.parametrize(("mapper_class", "mapped"), [(NewMapper, "new.a"), (OldMapper, "old.a")])
def test_names_are_mapped_by_old_and_new_mappers(mapper_class, mapped):
    mapper = compat.renaming_mapper(mapper_class, ["renaming"])
    assert dataclasses.astuple(mapper) == (["renaming"],)
    assert compat.map_name(mapper, "a") == mapped


def test_old_releases_get_the_mapper_of_the_checkpoint_with_that_of_scales():
    new = type("QuantizationConfig", (), {"get_checkpoint_weight_mapper": None})
    old = type("QuantizationConfig", (), {})
    scales, checkpoint = NewMapper(["scales"]), NewMapper(["checkpoint"])
    assert compat.cache_scale_mapper(new, scales, checkpoint) is scales
    assert compat.cache_scale_mapper(old, scales, checkpoint) == [scales, checkpoint]
    assert compat.cache_scale_mapper(old, None, checkpoint) is checkpoint


@pytest.mark.parametrize("version", ["0.24.0", "0.26.0", "0.33.1", "0.32.0+cpu", "0.30.0rc1"])
def test_supported_releases(version, caplog):
    compat.check_release(version)
    compat.warn_if_newer(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.23.1", "0.9.2.post1"])
def test_old_release_raises(version):
    with pytest.raises(
        UserError, match=rf"by vLLM {version}, which is older than 0.24, .* Install vLLM 0.24 to 0.33\."
    ):
        compat.check_release(version)


def test_experts_need_a_newer_release():
    compat.check_release("0.25.1", compat.OLDEST_WITH_EXPERTS)
    with pytest.raises(UserError, match=r"older than 0.25, .* for mixtures of experts. Install vLLM 0.25 to"):
        compat.check_release("0.24.0", compat.OLDEST_WITH_EXPERTS, " for mixtures of experts")


@pytest.mark.parametrize("version", ["0.34.0", "1.0.0", "0.1.dev17+gabc", "dev"])
def test_newer_and_unreleased_versions_are_tried_with_a_warning(version, caplog):
    compat.check_release(version)
    with caplog.at_level(logging.WARNING):
        compat.warn_if_newer(version)
    assert f"vLLM {version} is newer than 0.33" in caplog.text


@pytest.mark.parametrize("missing", ["vllm.model_executor.models.utils", "vllm.model_executor.layers.fused_moe"])
def test_engine_without_a_needed_class_refuses_only_checkpoints_of_matquant(monkeypatch, missing):
    """``register`` must not fail, since vLLM calls it for every model."""
    registered: dict[str, Any] = {}
    quantization: Any = ModuleType("vllm.model_executor.layers.quantization")
    quantization.register_quantization_config = lambda name: lambda cls: registered.setdefault(name, cls)
    base: Any = ModuleType("vllm.model_executor.layers.quantization.base_config")
    base.QuantizationConfig, base.QuantizeMethodBase = type("Base", (), {}), object
    package: Any = ModuleType("vllm")
    package.__version__ = "0.11.0"
    for name, module in {
        "vllm": package,
        quantization.__name__: quantization,
        base.__name__: base,
        missing: None,  # its import fails
        "matquant.vllm.quantization_config": None,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    matquant.vllm.register()
    assert set(registered) == {"matquant", "matgptq_quant"}
    for refusal in registered.values():
        with pytest.raises(
            UserError, match=r"by vLLM 0.11.0, which lacks what the plugin needs \(.*quantization_config"
        ):
            refusal.from_config({})


def test_graphs_of_all_kinds_are_found(monkeypatch):
    """A kind that is missed would be replayed at the bit-widths of its capture."""
    tables: list[dict[str, int]] = [{"table": i} for i in range(6)]
    wrapper = SimpleNamespace(_all_instances=[SimpleNamespace(concrete_cudagraph_entries=tables[0])])
    breakable = SimpleNamespace(_all_instances=[SimpleNamespace(entries=tables[1])])
    monkeypatch.setitem(sys.modules, "vllm.compilation.cuda_graph", SimpleNamespace(CUDAGraphWrapper=wrapper))
    monkeypatch.setitem(
        sys.modules, "vllm.compilation.breakable_cudagraph", SimpleNamespace(BreakableCUDAGraphWrapper=breakable)
    )
    manager = lambda table: SimpleNamespace(graphs=table)  # noqa: E731
    runner = SimpleNamespace(
        model=SimpleNamespace(cudagraphs=tables[2]),
        cudagraph_manager=manager(tables[3]),
        encoder_cudagraph_manager=None,
        speculator=SimpleNamespace(
            prefill_cudagraph_manager=manager(tables[4]), decode_cudagraph_manager=manager(tables[5])
        ),
    )
    assert compat.graph_tables(runner) == tables
    plain = SimpleNamespace(model=SimpleNamespace(), speculator=None)
    assert compat.graph_tables(plain) == tables[:2]


class Wrapper:
    """``WorkerWrapperBase`` of vLLM."""

    worker = "worker"

    def execute_model(self, scheduler_output: str) -> str:
        return f"executed {scheduler_output}"


def test_no_draft_model_runs_while_proposals_are_skipped(monkeypatch):
    """In both model runners, and with a release that has only one of them."""
    calls: list[str] = []

    class Proposer:
        _last_draft_probs: Any = "old"

        def propose(self, num_speculative_tokens: int, next_token_ids: torch.Tensor) -> torch.Tensor:
            calls.append("old runner")
            return torch.ones(len(next_token_ids), num_speculative_tokens)

    class Speculator:
        draft_tokens = torch.arange(12).view(4, 3)

        def propose(self, input_batch: Any, dummy_run: bool = False) -> torch.Tensor:
            calls.append("new runner")
            return torch.ones(input_batch.num_reqs, 3)

    old, new = "vllm.v1.spec_decode.draft_model", "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator"
    monkeypatch.setitem(sys.modules, old, SimpleNamespace(DraftModelProposer=Proposer))
    monkeypatch.setitem(sys.modules, new, None)
    compat.hook_proposals()
    monkeypatch.setitem(sys.modules, new, SimpleNamespace(StandaloneARSpeculator=Speculator))
    compat.hook_proposals()
    first: Any = Proposer()
    second: Any = Speculator()
    batch, tokens = SimpleNamespace(num_reqs=2), torch.tensor([5, 6])

    def shapes() -> list[tuple[int, ...]]:
        return [tuple(first.propose(3, next_token_ids=tokens).shape), tuple(second.propose(batch).shape)]

    assert shapes() == [(2, 3), (2, 3)]
    assert calls == ["old runner", "new runner"]
    first.matquant_skips = second.matquant_skips = True
    assert shapes() == [(2, 0), (2, 3)]
    assert first._last_draft_probs is None
    assert len(calls) == 2
    second.propose(batch, dummy_run=True)  # the profiling run before the first step
    first.matquant_skips = second.matquant_skips = False
    assert shapes() == [(2, 3), (2, 3)]
    assert len(calls) == 5


def test_steps_and_draft_models_are_hooked_once(monkeypatch):
    """Also with classes of a release that has only one of the two kinds of draft models."""
    wrapper = type("WorkerWrapperBase", (Wrapper,), {})
    draft = type(
        "DraftModelProposer", (), {"load_model": lambda self, target: setattr(self, "model", f"draft of {target}")}
    )
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", SimpleNamespace(WorkerWrapperBase=wrapper))
    monkeypatch.setitem(sys.modules, "vllm.v1.spec_decode.draft_model", SimpleNamespace(DraftModelProposer=draft))
    speculator = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator"
    monkeypatch.setitem(sys.modules, speculator, None)
    steps: list[Any] = []
    shared: list[Any] = []
    for _ in range(2):
        compat.hook_steps(lambda worker, output: steps.append((worker, output)))
        compat.hook_draft_model(lambda *models: shared.append(models))
    assert wrapper().execute_model("a") == "executed a"
    draft().load_model("target")
    assert (steps, shared) == ([("worker", "a")], [("draft of target", "target")])
    newer = type(
        "StandaloneARSpeculator", (), {"load_draft_model": lambda self, target, names: f"{target} with {names}"}
    )
    monkeypatch.setitem(sys.modules, speculator, SimpleNamespace(StandaloneARSpeculator=newer))
    compat.hook_draft_model(lambda *models: shared.append(models))
    assert newer().load_draft_model("t", "n") == "t with n"
    assert shared[1:] == [("t with n", "t")]
