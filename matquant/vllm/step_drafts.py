"""Drafts of a scheduler's steps: measures the steps, and applies ``draft_policy`` to them. Works without vLLM.

A step without drafts runs no draft model, see ``compat.hook_proposals``. The draft model's KV cache then lacks the tokens of
that step, so that later drafts of its requests are worse; the target's answers do not depend on it. A request that lacks more
tokens than the trials of ``draft_policy`` leave out is incomplete: its accepted drafts are not measured, and a step with no
other request has no drafts.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from matquant.formats.bits import MAX_BITS
from matquant.vllm.draft_policy import TRIAL_STEPS, DraftPolicy
from matquant.vllm.width_settings import WidthSettings

# A complete request lacks no more tokens than these, and this share of all.
MISSED_TOKENS, MISSED_SHARE = 2 * TRIAL_STEPS, 0.1


def reason_for_all_drafts(vllm_config: Any) -> str | None:
    """Reason why drafts cannot be left out of single steps of an engine that speculates; None if they can."""
    if vllm_config.speculative_config.method != "draft_model":
        return f"this is measured for the method draft_model only, and found {vllm_config.speculative_config.method}"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "data-parallel engines must agree on each step"
    return None


def may_leave_out_drafts(vllm_config: Any) -> bool:
    """True for an engine that speculates and whose scheduler may leave drafts out of single steps."""
    if vllm_config.speculative_config is None or reason_for_all_drafts(vllm_config):
        return False
    settings = WidthSettings.from_config(vllm_config.additional_config, MAX_BITS)
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    return settings.speculation == "adaptive" and hasattr(scheduler, "plans_drafts")


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedStep:
    """Step whose outputs have not arrived.

    Attributes:
        output: what the scheduler returned for it.
        width: name of its bit-width.
        batch: number of its requests.
        kind: True if it makes drafts and all requests have some, False if neither; None for a step that is not measured.
        complete: True if all its requests are complete.
        start: seconds.
    """

    output: Any
    width: str
    batch: int
    kind: bool | None
    complete: bool
    start: float


class StepDrafts:
    """Drafts of the steps of one scheduler.

    Args:
        clock: returns seconds.

    Attributes:
        policy: the decisions.
        last: True if the last step that was planned makes drafts.
    """

    def __init__(self, policy: DraftPolicy | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.policy = DraftPolicy() if policy is None else policy
        self.last = True
        self._clock = clock
        self._end = float("-inf")
        self._steps: collections.deque[_PlannedStep] = collections.deque()
        self._missed: dict[str, int] = {}  # number of tokens by request that the draft model has not read

    def plan(self, output: Any, width: str, computed: Callable[[str], int]) -> None:
        """Decide whether a step makes drafts for the next one, and set ``num_spec_tokens_to_schedule`` to 0 if not.

        Args:
            output: vLLM's ``SchedulerOutput``.
            width: name of the step's bit-width.
            computed: number of computed tokens of a request before the step.
        """
        tokens, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        if not tokens:
            return
        incomplete = sum(self._lacks_tokens(name, computed(name)) for name in tokens)
        started = {request.req_id for request in output.scheduled_new_reqs}
        decodes = not started and all(count == 1 + len(drafts.get(name) or ()) for name, count in tokens.items())
        makes = self.policy.use_drafts(width, len(tokens), len(tokens) - incomplete, decodes)
        if not makes:
            output.num_spec_tokens_to_schedule = 0
            self._missed |= {name: self._missed.get(name, 0) + count for name, count in tokens.items()}
        self.last = output.num_spec_tokens_to_schedule > 0
        has = sum(bool(drafts.get(name)) for name in tokens)
        is_measured = decodes and has == (len(tokens) if self.last else 0)
        kind = self.last if is_measured and makes == self.last else None
        self._steps.append(_PlannedStep(output, width, len(tokens), kind, not incomplete, self._clock()))

    def record(self, output: Any, sampled: Sequence[Sequence[int]]) -> None:
        """Record the tokens of a step, one sequence for each request."""
        if not any(step.output is output for step in self._steps):
            return  # it computed nothing
        step = self._steps.popleft()
        while step.output is not output:
            step = self._steps.popleft()
        now = self._clock()
        start, self._end = max(step.start, self._end), now
        if step.kind is not None:
            count = sum(map(len, sampled)) if step.complete and sampled else None
            self.policy.record(step.width, step.batch, step.kind, now - start, count)

    def forget(self, requests: Collection[str]) -> None:
        """Forget all requests but these."""
        self._missed = {name: count for name, count in self._missed.items() if name in requests}

    def _lacks_tokens(self, name: str, computed: int) -> bool:
        """True for an incomplete request with ``computed`` tokens; one that starts again is not."""
        if computed == 0:
            self._missed.pop(name, None)
        return self._missed.get(name, 0) > MISSED_TOKENS + MISSED_SHARE * computed
