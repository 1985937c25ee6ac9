"""Scheduler whose steps have one bit-width each: ``--scheduler-cls matquant.vllm.scheduler.WidthScheduler``.

A request names its bit-width in ``SamplingParams.extra_args``: ``{"bits": 3}``. Others have that of the load policy, or else
the one that the workers were told last (``WidthExtension.set_bits``).

Fairness: every bit-width with work gets one step in turn, and requests start in the order of their arrival (or priority), as
in vLLM's own scheduler, whatever their bit-widths. A request that did not find room at its turn is not overtaken by younger
ones of other bit-widths.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from matquant.errors import UserError
from matquant.vllm import compat
from matquant.vllm.block_keys import WidthKeyedHasher
from matquant.vllm.step import StepWidth
from matquant.vllm.step_drafts import StepDrafts, reason_for_all_drafts
from matquant.vllm.width_policy import LoadPolicy, StepCounts, Turns, Width, logger, width_name
from matquant.vllm.width_settings import WidthSettings

_STARTABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class SyncWidthScheduler(Scheduler):
    """Scheduler for engines without asynchronous scheduling."""

    plans_drafts = True  # step_drafts recognizes this scheduler by it
    running: list[Request]
    dynamic_sd_lookup: list[int] | None  # of vLLM's scheduler: drafts by number of running requests

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.width_settings = _settings(self.vllm_config)
        policy = self.width_settings.policy
        self._policy = None if policy is None else LoadPolicy(policy)
        self._counts = StepCounts()
        self._widths: dict[str, Width] = {}  # by request id; of requests that name their bit-width
        self._hashers: dict[str, WidthKeyedHasher] = {}
        self._refused: dict[str, str] = {}  # messages by request id
        self._server_width: Width = None if self._policy is None else self._policy.bits
        self._turns = Turns(self._server_width)
        self._passed_over: str | None = None  # id of the oldest request that did not find room at its turn
        self._drafts = self._step_drafts()

    def add_request(self, request: Request) -> None:
        """Add a request. One with a wrong bit-width ends with an error, which is logged."""
        try:
            bits = _named_bits(request)
            self._widths[request.request_id] = self.width_settings.request_bits(bits, None)
        except UserError as error:
            logger.error("Request %s is refused: %s", request.request_id, error)
            self._refused[request.request_id] = str(error)
            super().add_request(request)
            return
        if request._block_hasher is not None and (width := self._width(request)) is not None:
            self._hashers[request.request_id] = WidthKeyedHasher(request, width_name(width))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step for requests of one bit-width."""
        self._forget_finished()
        self._follow_load()
        startable = self._startable()
        self._key_blocks(startable)
        working = [request for request in self.running if _has_work(request)] + startable + self._blocked()
        width = self._turns.next({self._width(request) for request in working})
        with self._only(width, startable):
            output = super().schedule(*args, **kwargs)
        self._note_passed_over([request for request in startable if self._width(request) == width])
        self._counts.add(width, output.total_num_scheduled_tokens)
        makes_drafts = self._drafts is None or self._drafts.last
        output.matquant_step = StepWidth(width, self._state(width), makes_drafts)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """Process the outputs of a step, and end refused requests."""
        if self._drafts is not None:
            scheduled, sampled = _step_outputs(*args, **kwargs)
            self._drafts.record(scheduled, sampled)
        found: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        refused = {name: message for name, message in self._refused.items() if name in self.requests}
        self._refused = {}
        for name, message in refused.items():
            request = self.requests[name]
            self.finish_requests(name, RequestStatus.FINISHED_ERROR)
            outputs = found.setdefault(request.client_index, EngineCoreOutputs())
            outputs.outputs.append(compat.error_output(request, message))
        return found

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Decide whether the step makes drafts, before vLLM's scheduler notes how many there will be."""
        if self._drafts is not None:
            self._drafts.plan(
                scheduler_output, width_name(self._turns.last), lambda name: self.requests[name].num_computed_tokens
            )
        super()._update_after_schedule(scheduler_output)

    def _step_drafts(self) -> StepDrafts | None:
        """Decisions about drafts; None for an engine without speculative decoding, or where it is always on."""
        speculative = self.vllm_config.speculative_config
        if speculative is None or self.width_settings.speculation == "always":
            return None
        if reason := reason_for_all_drafts(self.vllm_config):
            logger.warning("Speculative decoding is always on, whether it pays or not: %s.", reason)
            return None
        if self.dynamic_sd_lookup is None:  # its presence says that the number of drafts changes between steps
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        return StepDrafts()

    def _width(self, request: Request) -> Width:
        named = self._widths.get(request.request_id)
        return self._server_width if named is None else named

    def _forget_finished(self) -> None:
        for name in self._widths.keys() - self.requests.keys():
            del self._widths[name]
            self._hashers.pop(name, None)
        if self._drafts is not None:
            self._drafts.forget(self.requests)

    def _follow_load(self) -> None:
        """Apply the load policy to all requests that do not name a bit-width."""
        if self._policy is None:
            return
        waiting = sum(len(queue) for _, queue in self._queues())
        bits = self._policy.update(waiting, self.kv_cache_manager.usage)
        if bits == self._server_width:
            return
        self._server_width = bits
        for name, hasher in self._hashers.items():
            request = self.requests[name]
            if self._widths[name] is None and request.num_computed_tokens > 0:
                hasher.change(
                    request, width_name(bits), *_computed(request), self.kv_cache_manager.block_pool.hash_block_size
                )

    def _key_blocks(self, startable: list[Request]) -> None:
        """Key the blocks of requests that may start, and compute all tokens, by their present bit-width."""
        for request in startable:
            hasher = self._hashers.get(request.request_id)
            if hasher is not None and request.num_computed_tokens == 0:
                hasher.restart(request, width_name(self._width(request)))

    def _queues(self) -> list[tuple[str, Any]]:
        """Queues of requests that do not run, by attribute, the first to start first."""
        names = ("kv_holding_waiting", "skipped_waiting", "waiting")  # releases have different ones
        return [(name, getattr(self, name)) for name in names if hasattr(self, name)]

    def _startable(self) -> list[Request]:
        """Waiting requests that may start in the next step, whatever its bit-width."""
        seats = min(getattr(self, name) for name in compat.REQUEST_LIMITS if hasattr(self, name)) - len(self.running)
        found: list[Request] = []
        for request in (request for _, queue in self._queues() for request in queue):
            if len(found) >= seats:
                break
            if request.status in _STARTABLE and request.request_id not in self._refused:
                found.append(request)
                if request.request_id == self._passed_over:
                    break
        return found

    def _blocked(self) -> list[Request]:
        """Waiting requests that vLLM's scheduler must look at before they may start, for example for a compiled grammar."""
        return [request for _, queue in self._queues() for request in queue if request.status not in _STARTABLE]

    def _note_passed_over(self, startable: list[Request]) -> None:
        if self._passed_over not in self.requests or self.requests[self._passed_over].status not in _STARTABLE:
            self._passed_over = None
        if self._passed_over is None:
            self._passed_over = next((r.request_id for r in startable if r.status in _STARTABLE), None)

    @contextlib.contextmanager
    def _only(self, width: Width, startable: list[Request]) -> Iterator[None]:
        """Hide the requests that the step must not contain from vLLM's scheduler."""
        running: list[Request] = self.running
        queues = [(name, queue, list(queue)) for name, queue in self._queues()]
        hidden = [request for request in running if self._width(request) != width]
        ids = {request.request_id for request in startable + self._blocked() if self._width(request) == width}
        self.running = [request for request in running if self._width(request) == width]
        shown = {}
        for name, _, requests in queues:
            shown[name] = [request for request in requests if request.request_id in ids]
            setattr(self, name, self._queue(shown[name]))
        limits = {name: getattr(self, name) for name in compat.REQUEST_LIMITS if hasattr(self, name)}
        for name, limit in limits.items():
            setattr(self, name, limit - len(hidden))
        try:
            yield
        finally:
            for name, limit in limits.items():
                setattr(self, name, limit)
            self.running = _in_order(running, hidden, self.running)
            for name, _, requests in queues:
                setattr(self, name, self._queue(_restored(requests, shown[name], list(getattr(self, name)))))

    def _queue(self, requests: list[Request]) -> Any:
        queue = create_request_queue(self.policy)
        for request in requests:
            queue.add_request(request)
        return queue

    def _state(self, width: Width) -> dict[str, Any]:
        """Description of the server for ``/v1/matquant/bits`` and the metrics."""
        policy = self._policy
        return {
            "step_bits": width_name(width),
            "server_bits": width_name(self._server_width),
            "switches": 0 if policy is None else policy.switches,
            "policy": None if policy is None else dataclasses.asdict(policy.settings),
            "running": len(self.running),
            "waiting": sum(len(queue) for _, queue in self._queues()),
            "kv_cache_usage": round(self.kv_cache_manager.usage, 4),
            "speculation": self._speculation_state(),
            **self._counts.to_json(),
        }

    def _speculation_state(self) -> dict[str, Any] | None:
        """Part of the state about drafts; None without speculative decoding."""
        if self.vllm_config.speculative_config is None:
            return None
        if self._drafts is None:
            return {"mode": "always"}
        return {"mode": "adaptive", "drafts": self._drafts.last, **self._drafts.policy.to_json()}


class WidthScheduler(SyncWidthScheduler, AsyncScheduler):
    """Scheduler for ``--scheduler-cls``."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a scheduler of the kind that the engine needs."""
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return SyncWidthScheduler(vllm_config, *args, **kwargs)


def _settings(vllm_config: Any) -> WidthSettings:
    """Settings of an engine. Raises UserError if it serves no nested checkpoint, or a setting is wrong."""
    choice = getattr(vllm_config.quant_config, "bit_choice", None)
    if choice is None:
        raise UserError(
            "matquant's scheduler needs a checkpoint with nested layers; leave --scheduler-cls out for others."
        )
    return WidthSettings.from_config(vllm_config.additional_config, choice.max_bits)


def _step_outputs(scheduler_output: Any, model_runner_output: Any) -> tuple[Any, Any]:
    """Return the scheduler's outputs of a step, and the tokens of each of its requests."""
    return scheduler_output, model_runner_output.sampled_token_ids


def _named_bits(request: Request) -> object:
    parameters = request.sampling_params
    return None if parameters is None else (parameters.extra_args or {}).get("bits")


def _has_work(request: Request) -> bool:
    """True if vLLM can schedule tokens of a running request now."""
    placeholders = getattr(request, "num_output_placeholders", 0)
    if placeholders and (
        request.num_computed_tokens + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens
    ):
        return False  # its last token is being computed
    return bool(request.num_tokens_with_spec + placeholders > request.num_computed_tokens)


def _computed(request: Request) -> tuple[int, int]:
    """Numbers of tokens of a request that are settled, and that are computed, see ``WidthKeyedHasher.change``."""
    computed = request.num_computed_tokens
    in_flight = getattr(request, "num_output_placeholders", 0)  # may be drafts that will be rejected
    return min(computed - in_flight, request.num_tokens), computed


def _in_order(before: list[Request], hidden: list[Request], after: list[Request]) -> list[Request]:
    """Running requests after a step, those that ran before first, in their order."""
    kept = {request.request_id for request in hidden} | {request.request_id for request in after}
    old = {request.request_id for request in before}
    return [r for r in before if r.request_id in kept] + [r for r in after if r.request_id not in old]


def _restored(before: list[Request], shown: list[Request], after: list[Request]) -> list[Request]:
    """Waiting requests after a step: preempted ones first, then those that still wait, in their order."""
    visible = {request.request_id for request in shown}
    waiting = {request.request_id for request in after}
    old = {request.request_id for request in before}
    return [r for r in after if r.request_id not in old] + [
        r for r in before if r.request_id not in visible or r.request_id in waiting
    ]
