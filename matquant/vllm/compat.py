"""Differences between releases of vLLM. The other modules of the plugin are written for the newest one that is listed here.

    release    difference
    < 0.33     an output that ends a request with an error has no message
    < 0.32     ``WeightsMapper.map_name`` is ``_map_name``; waiting requests are in ``skipped_waiting`` too, later ones in
               ``kv_holding_waiting``; there is no ``max_num_active_reqs``
    < 0.30     the loader does not apply ``QuantizationConfig.get_checkpoint_weight_mapper``, only ``get_cache_scale_mapper``
    < 0.26     ``WeightsMapper.orig_to_new_renaming`` is ``orig_to_new_renamings``
    < 0.25     ``get_cache_scale_mapper`` returns None; tensors of experts are not passed to the layer of experts

Nothing is imported from vLLM before it is needed, so that the plugin can say which releases it works with.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from matquant.errors import UserError
from matquant.vllm import plain_graphs

OLDEST, NEWEST = (0, 24), (0, 33)
OLDEST_WITH_EXPERTS = (0, 25)

DRAFT_PREFIX = "draft_model."  # of the names of a draft model's layers

# Attributes of the scheduler that limit the number of running requests; releases have one or both.
REQUEST_LIMITS = ("max_num_running_reqs", "max_num_active_reqs")

# Classes that make drafts with a draft model, of vLLM's old and new model runner.
_PROPOSERS = (
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer"),
    ("vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator", "StandaloneARSpeculator"),
)

logger = logging.getLogger(__name__)


def parse_release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a release; None for a build of an unreleased commit."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None or "dev" in version else (int(found[1]), int(found[2]))


def check_release(version: str, oldest: tuple[int, int] = OLDEST, purpose: str = "") -> None:
    """Check that a release is not too old.

    Args:
        version: ``vllm.__version__``.
        purpose: what ``oldest`` is needed for, for the message.

    Raises:
        UserError: the release is older than ``oldest``.
    """
    release = parse_release(version)
    if release is not None and release < oldest:
        reason = f"which is older than {_name(oldest)}, the oldest release that works{purpose}"
        raise UserError(unsupported(version, reason, oldest))


def warn_if_newer(version: str) -> None:
    """Log a warning for a release that is newer than all that the plugin was compared with."""
    release = parse_release(version)
    if release is None or release > NEWEST:
        logger.warning(
            "vLLM %s is newer than %s, the newest release that matquant was compared with.", version, _name(NEWEST)
        )


def unsupported(version: str, reason: str, oldest: tuple[int, int] = OLDEST) -> str:
    """Message for an engine that the plugin does not work with."""
    return (
        f"This checkpoint of matquant cannot be served by vLLM {version}, {reason}. Install vLLM {_name(oldest)} to "
        f"{_name(NEWEST)}."
    )


def register_refusal(version: str, quant_methods: Sequence[str], error: ImportError) -> None:
    """Register quantization methods that raise UserError when a checkpoint of matquant is loaded.

    The plugin is loaded in every vLLM process, also for other checkpoints, which must work. Without a registration vLLM would
    say that the quantization method is unknown.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    message = unsupported(version, f"which lacks what the plugin needs ({error})")

    class Refusal(QuantizationConfig):
        """Quantization config that cannot be used."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise UserError(message) from error

    for name in quant_methods:
        register_quantization_config(name)(type(name, (Refusal,), {}))


def map_name(mapper: Any, name: str) -> str | None:
    """Map the name of a stored tensor with a ``WeightsMapper``; None for a tensor that vLLM ignores."""
    mapped: str | None = mapper.map_name(name) if hasattr(mapper, "map_name") else mapper._map_name(name)
    return mapped


def renaming_mapper(mapper_class: Any, renamings: list[Any]) -> Any:
    """``WeightsMapper`` that applies the renamings of Transformers."""
    fields = {field.name for field in dataclasses.fields(mapper_class)}
    (name,) = fields & {"orig_to_new_renaming", "orig_to_new_renamings"}
    return mapper_class(**{name: renamings})


def cache_scale_mapper(config_class: Any, mapper: Any, checkpoint_mapper: Any) -> Any:
    """Mapper that ``get_cache_scale_mapper`` returns, the only one of a quantization config that old releases apply.

    Args:
        config_class: vLLM's ``QuantizationConfig``.
        mapper: what the config class itself returns.
        checkpoint_mapper: mapper of the names in the checkpoint.
    """
    if hasattr(config_class, "get_checkpoint_weight_mapper"):
        return mapper
    return checkpoint_mapper if mapper is None else mapper | checkpoint_mapper


def graph_tables(runner: Any) -> list[dict[Any, Any]]:
    """All dictionaries in which a worker keeps captured CUDA graphs, in a stable order.

    Args:
        runner: model runner of the worker.
    """
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    tables = [wrapper.concrete_cudagraph_entries for wrapper in sorted(CUDAGraphWrapper._all_instances, key=id)]
    tables += [wrapper.entries for wrapper in sorted(BreakableCUDAGraphWrapper._all_instances, key=id)]
    if (microbatches := vars(runner.model).get("cudagraphs")) is not None:  # of UBatchWrapper
        tables.append(microbatches)
    return tables + [manager.graphs for manager in _graph_managers(runner)]


def hook_steps(begin_step: Callable[[Any, Any], None]) -> None:
    """Call ``begin_step(worker, scheduler_output)`` before each step of all workers of this process."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def before(wrapper: Any, scheduler_output: Any, *_: Any, **__: Any) -> None:
        begin_step(wrapper.worker, scheduler_output)

    _hook(WorkerWrapperBase, "execute_model", before=before)


def hook_draft_model(share: Callable[[Any, Any], None]) -> None:
    """Call ``share(draft, target)`` with the models of speculative decoding when a draft model has been loaded."""

    def after(proposer: Any, _: Any, target: Any, *__: Any, **___: Any) -> None:
        share(proposer.model, target)

    def after_v2(_: Any, draft: Any, target: Any, *__: Any, **___: Any) -> None:
        share(draft, target)

    hooks = (("load_model", after), ("load_draft_model", after_v2))
    for (module, owner), (method, hook) in zip(_PROPOSERS, hooks, strict=True):
        with contextlib.suppress(ImportError):  # a release without it refuses draft models itself
            _hook(getattr(importlib.import_module(module), owner), method, after=hook)


def hook_proposals() -> None:
    """Make no drafts, and run no draft model, while the attribute ``matquant_skips`` of a proposer is true.

    With no drafts requested vLLM still runs the draft model once, to keep its KV cache complete.
    """

    def instead(proposer: Any, *_: Any, next_token_ids: Any = None, **__: Any) -> Any:
        if not getattr(proposer, "matquant_skips", False):
            return None
        proposer._last_draft_probs = None
        return next_token_ids.new_empty(len(next_token_ids), 0)

    def instead_v2(speculator: Any, input_batch: Any, *_: Any, dummy_run: bool = False, **__: Any) -> Any:
        if dummy_run or not getattr(speculator, "matquant_skips", False):
            return None
        return speculator.draft_tokens[: input_batch.num_reqs]  # old ones, which nobody schedules

    hooks: tuple[Callable[..., Any], ...] = (instead, instead_v2)
    for (module, owner), hook in zip(_PROPOSERS, hooks, strict=True):
        with contextlib.suppress(ImportError):
            _hook(getattr(importlib.import_module(module), owner), "propose", instead=hook)


def hook_plain_steps(adds: Callable[[Any], bool]) -> None:
    """Have the older model runner capture, and use, full CUDA graphs of steps without drafts, see ``plain_graphs``.

    Args:
        adds: whether an engine with this ``VllmConfig`` has them.
    """
    try:
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ImportError:
        return

    def after(runner: Any, *_: Any, **__: Any) -> None:
        if adds(runner.vllm_config):
            plain_graphs.add_plain_graphs(runner, CUDAGraphMode.FULL)

    def choosing(runner: Any, *_: Any, **step: Any) -> Any:
        captures = step.get("force_uniform_decode") is not None
        counts: list[Any] = [step.get(name) for name in ("num_tokens", "num_reqs", "max_num_scheduled_tokens")]
        if captures or step.get("use_cascade_attn") or None in counts:
            return contextlib.nullcontext()
        return plain_graphs.step_graphs(runner, *counts)

    def capturing(runner: Any, key: Any, *_: Any, **__: Any) -> Any:
        return plain_graphs.capture_graphs(runner, key)

    hooks: dict[str, dict[str, Any]] = {
        "_check_and_update_cudagraph_mode": {"after": after},
        "_determine_batch_execution_and_padding": {"within": choosing},
        "_warmup_and_capture": {"within": capturing},
    }
    if missing := [method for method in hooks if not hasattr(GPUModelRunner, method)]:
        logger.warning("Steps without drafts have no full CUDA graphs: this release of vLLM lacks %s.", missing[0])
        return
    for method, hook in hooks.items():
        _hook(GPUModelRunner, method, **hook)


def _hook(
    owner: type,
    method: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
    instead: Callable[..., Any] | None = None,
    within: Callable[..., contextlib.AbstractContextManager[None]] | None = None,
) -> None:
    """Call functions before a method, with its arguments, or after it, with the result as second argument. Idempotent.

    What ``instead`` returns, if that is not None, is the result, and the method is not called. Else it is called in the context
    that ``within`` returns.
    """
    original: Any = getattr(owner, method)
    if getattr(original, "matquant_hook", False):
        return

    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self, *args, **kwargs)
        result = None if instead is None else instead(self, *args, **kwargs)
        if result is None:
            with contextlib.nullcontext() if within is None else within(self, *args, **kwargs):
                result = original(self, *args, **kwargs)
        if after is not None:
            after(self, result, *args, **kwargs)
        return result

    vars(hooked)["matquant_hook"] = True
    setattr(owner, method, hooked)


def error_output(request: Any, message: str) -> Any:
    """Output of the engine that ends a request with an error; releases before 0.33 do not pass the message on."""
    from vllm import outputs
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    fields: dict[str, Any] = {"finish_reason": FinishReason.ERROR}
    if hasattr(outputs, "RequestError") and "error" in EngineCoreOutput.__struct_fields__:
        fields["error"] = outputs.RequestError(code="validation_error", message=message)
    return EngineCoreOutput(request_id=request.request_id, new_token_ids=[], **fields)


def _graph_managers(runner: Any) -> list[Any]:
    """Graph managers of vLLM's second model runner and of its speculator."""
    owners = [owner for owner in (runner, getattr(runner, "speculator", None)) if owner is not None]
    found = [value for owner in owners for name, value in vars(owner).items() if name.endswith("cudagraph_manager")]
    return [manager for manager in found if hasattr(manager, "graphs")]


def _name(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
