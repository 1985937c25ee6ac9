"""Scheduler of steps with one bit-width: vLLM's real scheduler and KV cache manager, and a model that answers token 7."""

import importlib.util
import logging
from typing import Any

import pytest
from scheduling import BLOCK, Engine, pack_tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]

SECTION = {"policy": {"bits": [8, 3], "lower_at_waiting": 4, "raise_at_waiting": 1, "hold_seconds": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return pack_tiny(tmp_path_factory.mktemp("scheduler"))


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


def test_an_engine_without_nested_layers_is_refused(folder):
    from types import SimpleNamespace

    from matquant.errors import UserError
    from matquant.vllm.scheduler import _settings

    with pytest.raises(UserError, match="needs a checkpoint with nested layers"):
        _settings(SimpleNamespace(quant_config=None, additional_config={}))
    with pytest.raises(UserError, match="has no setting polizy"):
        Engine(folder, section={"polizy": {}})
