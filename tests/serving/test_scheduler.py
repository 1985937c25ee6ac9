"""Scheduler of steps with one bit-width: vLLM's real scheduler and KV cache manager, and a model that answers token 7."""

import collections
import importlib.util
import logging
import os
from typing import Any

import pytest
import torch
from engine import QUIET
from packing import Opened
from shared import TINY

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
os.environ.update(QUIET)

BLOCK = 32
SECTION = {"policy": {"bits": [8, 3], "lower_at_waiting": 4, "raise_at_waiting": 1, "hold_seconds": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    where = tmp_path_factory.mktemp("scheduler")
    return str(Opened(TINY, where / "store", group_size=64).pack(where / "packed"))


class Engine:
    """Scheduler, and steps of a model in its place.

    Args:
        ahead: number of steps that are scheduled before the outputs of the first of them arrive.
    """

    def __init__(
        self, folder: str, seats: int = 4, blocks: int = 100, ahead: int = 0, section: Any = None, **arguments: Any
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from matquant.vllm.scheduler import WidthScheduler

        config = EngineArgs(
            model=folder,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=seats,
            block_size=BLOCK,
            enforce_eager=True,
            scheduler_cls="matquant.vllm.scheduler.WidthScheduler",
            additional_config={} if section is None else {"matquant": section},
            **arguments,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = ahead > 0  # vLLM switches it off on a CPU
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = WidthScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=False,
        )
        self.ahead, self.pending = ahead, collections.deque()
        self.accepted = 0  # drafts of each request, if it has so many
        self.steps: list[tuple[Any, dict[str, int]]] = []  # bit-width, and tokens by request
        self.errors: list[str] = []
        self.requests: dict[str, Any] = {}
        self.started: list[str] = []

    def add(self, bits: Any, prompt: int = 40, tokens: int = 4, seed: int | None = None) -> str:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        name = str(len(self.requests))
        first = len(self.requests) if seed is None else seed
        parameters = SamplingParams(
            max_tokens=tokens, ignore_eos=True, extra_args=None if bits is None else {"bits": bits}
        )
        request = Request(name, [1 + first, *([5] * (prompt - 1))], parameters, None, block_hasher=self.hasher)
        self.requests[name] = request
        self.scheduler.add_request(request)
        return name

    def step(self) -> dict[str, int]:
        output = self.scheduler.schedule()
        tokens = dict(output.num_scheduled_tokens)
        self.steps.append((output.matquant_step.bits, tokens))
        self.started += [name for name in tokens if name not in self.started]
        self.pending.append(output)
        while len(self.pending) > self.ahead:
            self.deliver()
        return tokens

    def deliver(self) -> None:
        """Outputs of the oldest step that has not delivered any."""
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        output = self.pending.popleft()
        names = list(output.num_scheduled_tokens)
        ends = {**{r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}}
        cached = output.scheduled_cached_reqs
        ends |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        reads_prompt = {n: ends[n] + output.num_scheduled_tokens[n] < self.requests[n].num_prompt_tokens for n in names}
        found = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[] if reads_prompt[name] else self.sampled(output, name) for name in names],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        if not self.ahead and (drafts := output.num_spec_tokens_to_schedule):
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[7] * drafts for _ in names]))
        for outputs in found.values():
            self.errors += [o.request_id for o in outputs.outputs if str(o.finish_reason) == "error"]

    def sampled(self, output: Any, name: str) -> list[int]:
        drafts = output.scheduled_spec_decode_tokens.get(name) or ()
        return [7] * (1 + min(self.accepted, len(drafts)))

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps: {self.steps[-8:]}")

    def assert_one_width_a_step(self, widths: dict[str, Any]) -> None:
        for width, tokens in self.steps:
            assert {widths[name] for name in tokens} <= {width}


@pytest.mark.parametrize("ahead", [0, 1])
def test_bit_widths_take_turns_and_requests_start_in_order(folder, ahead):
    engine = Engine(folder, ahead=ahead)
    widths = {engine.add(bits): bits for bits in (8, 3, 2, 8, 8, 8, 8, None, 3, 8, 8, 2, 8)}
    while engine.scheduler.has_requests():
        engine.step()
        running = [request.request_id for request in engine.scheduler.running]
        assert running == [name for name in engine.started if name in running]  # the last one is preempted first
        assert len(running) <= 4
    engine.assert_one_width_a_step(widths)
    assert all(len(request.output_token_ids) == 4 for request in engine.requests.values())
    for place, name in enumerate(engine.started):
        older_that_wait = [other for other in widths if int(other) < int(name) and other not in engine.started[:place]]
        assert len(older_that_wait) < 4  # the number of seats
    last: dict[str, int] = {}
    for index, (width, tokens) in enumerate(engine.steps):  # nobody pauses for more steps than there are other widths
        for name in tokens:
            gap = index - last.get(name, index)
            assert gap <= len({*widths.values()}) + ahead, (width, name, gap)
            last[name] = index
    kind = type(engine.scheduler).__name__
    assert kind == ("WidthScheduler" if ahead else "SyncWidthScheduler")


def test_a_flood_of_one_bit_width_does_not_delay_another(folder):
    engine = Engine(folder)
    flood = [engine.add(8, tokens=3) for _ in range(12)]
    other = engine.add(3, tokens=6)
    late = [engine.add(8, tokens=3) for _ in range(30)]
    engine.run()
    assert engine.started.index(other) <= len(flood) + 3
    first = next(index for index, (_, tokens) in enumerate(engine.steps) if other in tokens)
    own = [index for index, (_, tokens) in enumerate(engine.steps) if other in tokens]
    assert own == [first + 2 * i for i in range(6)]  # every second step
    assert set(late) < set(engine.started)


@pytest.mark.parametrize("pattern", [(8, 3), (8, 3, 2, None), (8, 8, 8, 3)])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_full_cache_delays_but_stops_nobody(folder, pattern, ahead):
    """Seven blocks: one request of 100 tokens needs four. Requests are preempted and start again."""
    engine = Engine(folder, blocks=8, ahead=ahead)
    widths = {engine.add(pattern[i % len(pattern)], prompt=40, tokens=60): pattern[i % len(pattern)] for i in range(9)}
    engine.run(5000)
    engine.assert_one_width_a_step(widths)
    assert all(len(request.output_token_ids) == 60 for request in engine.requests.values())
    assert sum(request.num_preemptions for request in engine.requests.values()) > 0


def test_a_request_without_room_is_not_overtaken(folder):
    """Six blocks, of which the first request uses three and four; the second needs four at once, and small ones follow."""
    engine = Engine(folder, blocks=7, seats=6)
    first = engine.add(8, prompt=90, tokens=30)
    engine.step()
    large = engine.add(3, prompt=127, tokens=1)
    small = [engine.add(8, prompt=8, tokens=40) for _ in range(8)]
    engine.run()
    assert engine.started[:2] == [first, large]
    assert engine.started[2:] == small


def test_requests_that_are_not_ready_take_no_places_of_others(folder):
    """Requests with a grammar that is not compiled yet: vLLM looks at them in each step."""
    from vllm.v1.request import RequestStatus

    engine, ready = Engine(folder, seats=2), False
    names = [engine.add(bits) for bits in (8, 3, 8, 3, 2, 8)]
    blocked = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    def is_ready(request: Any) -> bool:
        if request.status == blocked and ready:
            request.status = RequestStatus.WAITING
        return request.status != blocked

    engine.scheduler._handle_blocked_waiting_request = is_ready
    for name in names[:3]:
        engine.requests[name].status = blocked
    for _ in range(3):
        engine.step()
        assert len(engine.scheduler.running) <= 2
    assert set(engine.started) == {names[3], names[4]}
    ready = True
    for _ in range(100):
        engine.step()
        assert len(engine.scheduler.running) <= 2
    assert all(len(engine.requests[name].output_token_ids) == 4 for name in names)


def test_prefixes_are_reused_at_their_own_bit_width_only(folder):
    engine = Engine(folder)
    found = []
    for bits in (8, 3, 8, None, 3, None):
        name = engine.add(bits, prompt=70, seed=0)
        found.append(engine.step()[name])
        engine.run()
    assert found == [70, 70, 70 - 2 * BLOCK, 70, 70 - 2 * BLOCK, 70 - 2 * BLOCK]


def test_a_wrong_bit_width_ends_the_request_and_no_other(folder, caplog):
    engine = Engine(folder, hf_overrides={"max_bits": 4})
    with caplog.at_level(logging.ERROR):
        good = [engine.add(3), engine.add(4)]
        bad = [engine.add(bits) for bits in (5, 9, "3", True)]
        good += [engine.add(2)]
        engine.run()
    assert sorted(engine.errors) == bad
    assert not set(bad) & set(engine.started)
    assert all(len(engine.requests[name].output_token_ids) == 4 for name in good)
    assert "5 bits cannot be read; the planes that this server keeps hold at most 4 bits" in caplog.text


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_client_that_disconnects(folder, after):
    from vllm.v1.request import RequestStatus

    engine = Engine(folder, seats=2)
    names = [engine.add(bits) for bits in (8, 3, 8, 3, 2)]
    for _ in range(after):
        engine.step()
    engine.scheduler.finish_requests([names[0], names[3]], RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert all(len(engine.requests[name].output_token_ids) == 4 for name in (names[1], names[2], names[4]))
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine.scheduler._widths
    assert not engine.scheduler._hashers


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_load_changes_the_bit_width_between_two_steps(folder, ahead, caplog):
    engine = Engine(folder, seats=2, section=SECTION, ahead=ahead)
    first = engine.add(None, tokens=12)
    named = engine.add(6, tokens=12)
    assert [engine.step() and engine.steps[-1][0] for _ in range(4)].count(8) == 2
    before = list(engine.requests[first].block_hashes)
    with caplog.at_level(logging.INFO):
        queue = [engine.add(None) for _ in range(8)]
        engine.step()
        engine.step()
    assert {width for width, _ in engine.steps[-2:]} == {3, 6}  # both go on at once
    assert "Bit-width 8 -> 3: 8 requests wait" in caplog.text
    assert engine.requests[first].block_hashes[:1] == before[:1]
    engine.run()
    assert all(width == 6 for width, tokens in engine.steps if named in tokens)
    assert {width for width, tokens in engine.steps if first in tokens} == {8, 3}
    assert engine.steps[-1][0] == 8  # and rises when the queue is empty
    assert all(len(engine.requests[name].output_token_ids) == 4 for name in queue)
    state = engine.scheduler._state(None)
    assert state["switches"] == 2
    assert state["server_bits"] == "8"
    assert sum(state["tokens"].values()) == sum(sum(tokens.values()) for _, tokens in engine.steps)


def test_a_change_in_the_middle_of_a_chunked_prompt(folder):
    """The complete blocks of the first chunks stay cached at 8 bits; later ones are cached apart."""
    engine = Engine(folder, seats=2, section=SECTION, max_num_batched_tokens=48, enable_chunked_prefill=True)
    name = engine.add(None, prompt=120, tokens=2, seed=0)
    assert engine.step() == {name: 48}
    for _ in range(5):
        engine.add(None, prompt=8, tokens=1)
    assert engine.step()[name] == 48
    assert [width for width, _ in engine.steps] == [8, 3]
    engine.run()
    assert engine.scheduler._server_width == 8
    again = engine.add(None, prompt=120, tokens=2, seed=0)
    assert engine.step()[again] == 48
    assert engine.requests[again].num_computed_tokens == 48 + BLOCK  # one block of 32 tokens was complete at 8 bits


def test_a_preempted_request_has_the_keys_of_its_new_bit_width(folder):
    """It is computed again from its first token on, so that its blocks must not be found at the old bit-width."""
    engine = Engine(folder, section=SECTION, blocks=6)
    name = engine.add(None, prompt=40, tokens=40, seed=0)
    engine.step()
    for _ in range(4):
        engine.add(None, prompt=70, tokens=30)  # two of them do not fit
    engine.step()
    assert [width for width, _ in engine.steps] == [8, 3]
    engine.scheduler._preempt_request(engine.scheduler.running.pop(0), 0.0)
    engine.step()
    engine.run()
    alone = Engine(folder)
    wanted = [alone.add(bits, prompt=40, tokens=40, seed=0) for bits in (3, 8)]
    alone.run()
    three, eight = (alone.requests[other].block_hashes for other in wanted)
    found = engine.requests[name].block_hashes
    assert found[0] in (three[0], eight[0])
    assert engine.requests[name].num_preemptions > 0
    first = next(width for width, tokens in engine.steps[2:] if name in tokens)
    assert found[0] == {3: three, 8: eight}[first][0]


class Speculative(Engine):
    """Engine with drafts, whose clock moves by the costs of its steps.

    Args:
        costs: seconds of a step with and of one without drafts.
    """

    def __init__(self, folder: str, costs: tuple[float, float], section: Any = None, **arguments: Any) -> None:
        from matquant.vllm.draft_policy import DraftPolicy
        from matquant.vllm.step_drafts import StepDrafts

        draft = {"method": "draft_model", "model": folder, "num_speculative_tokens": 3}
        super().__init__(folder, speculative_config=draft, section=section, **arguments)
        self.costs, self.now, self.accepted = costs, 0.0, 2
        self.outputs: list[Any] = []
        if self.scheduler._drafts is not None:
            self.scheduler._drafts = StepDrafts(DraftPolicy(first_steps=6), lambda: self.now)

    def step(self) -> dict[str, int]:
        before = len(self.pending)
        schedule = self.scheduler.schedule

        def kept() -> Any:
            self.outputs.append(schedule())
            return self.outputs[-1]

        self.scheduler.schedule = kept
        try:
            assert before <= self.ahead
            return super().step()
        finally:
            self.scheduler.schedule = schedule

    def deliver(self) -> None:
        output = self.pending[0]
        if output.num_scheduled_tokens:
            makes_drafts = output.num_spec_tokens_to_schedule > 0
            assert makes_drafts == output.matquant_step.makes_drafts
            self.now += self.costs[not makes_drafts]
        super().deliver()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("costs", "pays"), [((2.0, 1.0), True), ((4.0, 1.0), False)])
@pytest.mark.parametrize("widths", [(None,), (8, 3)])
def test_drafts_are_left_out_where_they_cost_more(folder, ahead, costs, pays, widths):
    """A request receives three tokens in a step with drafts; a step without costs one second."""
    engine = Speculative(folder, costs, ahead=ahead)
    names = [engine.add(width, tokens=80) for width in widths for _ in range(2)]
    engine.run()
    assert all(len(engine.requests[name].output_token_ids) == 80 for name in names)
    had = dict.fromkeys(names, 0)  # drafts that the last step of the request made
    for output in engine.outputs:
        for name in output.num_scheduled_tokens:
            assert len(output.scheduled_spec_decode_tokens.get(name) or ()) <= had[name]
            had[name] = output.num_spec_tokens_to_schedule
    late = engine.outputs[len(engine.outputs) // 2 :]
    assert {output.num_spec_tokens_to_schedule for output in late if output.num_scheduled_tokens} == {3 if pays else 0}
    state = engine.scheduler._state(None)["speculation"]
    assert (state["mode"], state["changes"]) == ("adaptive", 0 if pays else len(widths))
    assert {(found["bits"], found["drafts"]) for found in state["ranges"] if found["requests"] == [2, 2]} == {
        ("default" if width is None else str(width), pays) for width in widths
    }


@pytest.mark.parametrize(("costs", "drafting"), [((2.0, 1.0), 1.0), ((4.0, 1.0), 0.0)])
def test_metrics_of_drafts(folder, costs, drafting):
    from prometheus_client import REGISTRY

    from matquant.vllm import metrics

    engine = Speculative(folder, costs)
    engine.add(5, tokens=80)
    engine.run()
    state = engine.scheduler._state(None)
    metrics.update(state)
    labels = {"bits": "5", "requests": "1-1"}
    assert REGISTRY.get_sample_value("matquant_drafting", labels) == drafting
    for kind, speed in (("drafts", 3 / costs[0]), ("plain", 1.0)):
        found = REGISTRY.get_sample_value("matquant_measured_tokens_per_second", labels | {"kind": kind})
        assert found == pytest.approx(speed, abs=0.01)
    before = REGISTRY.get_sample_value("matquant_drafting_changes_total")
    state["speculation"]["changes"] += 2
    metrics.update(state)
    assert REGISTRY.get_sample_value("matquant_drafting_changes_total") == before + 2


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("section", [{"speculation": "always"}, {"speculation": "adaptive"}])
def test_always_is_always(folder, ahead, section):
    engine = Speculative(folder, (9.0, 1.0), ahead=ahead, section=section)
    engine.add(None, tokens=90)
    engine.run()
    drafts = [output.num_spec_tokens_to_schedule for output in engine.outputs if output.num_scheduled_tokens]
    assert set(drafts) == ({3} if section["speculation"] == "always" else {0, 3})
    mode = engine.scheduler._state(None)["speculation"]["mode"]
    assert mode == section["speculation"]


def test_an_engine_whose_drafts_cannot_be_left_out_says_so(folder, caplog):
    engine = Engine(folder, speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    assert engine.scheduler._drafts is None
    assert engine.scheduler._state(None)["speculation"] == {"mode": "always"}


def test_an_engine_without_nested_layers_is_refused(folder):
    from types import SimpleNamespace

    from matquant.errors import UserError
    from matquant.vllm.scheduler import _settings

    with pytest.raises(UserError, match="needs a checkpoint with nested layers"):
        _settings(SimpleNamespace(quant_config=None, additional_config={}))
    with pytest.raises(UserError, match="has no setting polizy"):
        Engine(folder, section={"polizy": {}})
