"""Drafts only where they are measured to be faster: the decision, and the steps of a scheduler that it is applied to."""

import itertools
import logging
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matquant.errors import UserError
from matquant.vllm.draft_policy import FIRST_STEPS, MARGIN, TRIAL_SHARE, TRIAL_STEPS, DraftPolicy
from matquant.vllm.step_drafts import MISSED_TOKENS, StepDrafts
from matquant.vllm.width_settings import WidthSettings

PAUSE = round(TRIAL_STEPS / TRIAL_SHARE)


class Engine:
    """Steps of requests of one bit-width, whose costs the test sets, in the place of vLLM.

    Args:
        ahead: number of steps that are planned before the outputs of the first of them arrive.
    """

    def __init__(self, ahead: int = 0) -> None:
        self.now, self.ahead = 0.0, ahead
        self.policy = DraftPolicy()
        self.drafts = StepDrafts(self.policy, lambda: self.now)
        self.plain, self.drafting, self.accepted = 1.0, 1.5, 1  # seconds of a step, and accepted drafts of a request
        self.pending: list[tuple[Any, float]] = []
        self.free = 0.0  # when the device has computed all planned steps
        self.has: set[str] = set()  # requests that have drafts
        self.computed: dict[str, int] = {}
        self.made: list[bool] = []

    def step(self, names: list[str], new: int = 0, width: str = "8") -> bool:
        """Plan a step, the first ``new`` requests of which read their prompt, and deliver the outputs that are due."""
        started = names[:new]
        tokens = {name: 5 if name in started else 4 if name in self.has else 1 for name in names}
        output = SimpleNamespace(
            num_scheduled_tokens=tokens,
            scheduled_spec_decode_tokens={name: [-1] * 3 for name in names if name in self.has},
            scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in started],
            num_spec_tokens_to_schedule=3,
        )
        begin = max(self.now, self.free)
        self.drafts.plan(output, width, lambda name: self.computed.get(name, 0))
        makes = output.num_spec_tokens_to_schedule > 0
        self.free = begin + (self.drafting if makes else self.plain)
        counts = [[7] * (1 + self.accepted if name in self.has else 1) for name in names]
        for name, found in zip(names, counts, strict=True):
            self.computed[name] = self.computed.get(name, 4 if name in started else 0) + len(found)
        self.pending.append(((output, counts), self.free))
        self.has = (self.has - set(names)) | (set(names) if makes else set())
        while len(self.pending) > self.ahead:
            (arrived, sampled), self.now = self.pending.pop(0)
            self.drafts.record(arrived, sampled)
        self.made.append(makes)
        return makes

    def run(self, names: list[str], steps: int, new: int = 0) -> float:
        """Share of the steps that made drafts."""
        return statistics.mean(self.step(names, new if i == 0 else 0) for i in range(steps))


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(
    ("drafting", "accepted", "pays"),
    [(1.5, 1, True), (2.5, 1, False), (3.5, 3, True), (1.2, 0, False), (4.2, 3, False)],
)
def test_drafts_are_made_where_they_are_faster(ahead, drafting, accepted, pays, caplog):
    engine = Engine(ahead)
    engine.drafting, engine.accepted = drafting, accepted
    with caplog.at_level(logging.INFO):
        engine.run(["a", "b", "c"], 200, new=3)
    assert engine.run(["a", "b", "c"], 2 * PAUSE) == pytest.approx(float(pays), abs=1.1 * TRIAL_SHARE)
    (found,) = engine.policy.to_json()["ranges"]
    assert (found["bits"], found["requests"], found["drafts"]) == ("8", [3, 4], pays)
    assert found["tokens_per_second"]["plain"] == pytest.approx(3.0, rel=0.01)
    assert found["tokens_per_second"]["drafts"] == pytest.approx(3 * (1 + accepted) / drafting, rel=0.01)
    assert engine.policy.to_json()["changes"] == len(caplog.records) == (0 if pays else 1)
    if not pays:
        assert "Drafts off for 3 to 4 requests in a step (bits: 8)" in caplog.text


@pytest.mark.parametrize("ahead", [0, 1])
def test_drafting_stops_and_resumes_when_the_costs_change(ahead):
    engine = Engine(ahead)
    engine.run(["a"], 300, new=1)
    assert engine.policy.to_json()["changes"] == 0
    engine.drafting = 5.0
    engine.run(["a"], PAUSE)
    assert engine.run(["a"], 300) <= 2 * TRIAL_STEPS / 300
    engine.drafting = 1.1
    engine.run(["a"], 5 * PAUSE)  # a trial was five times as slow as other steps
    assert engine.policy.to_json()["ranges"][0]["drafts"]
    assert engine.run(["a"], 300) == 0.0  # its tokens are missing in the draft model's cache
    assert engine.run(["b"], 300, new=1) > 0.95  # those of a new request are not


def test_each_batch_size_and_bit_width_has_a_decision_of_its_own():
    engine = Engine()
    few, many = ["a"], [f"r{i}" for i in range(16)]
    engine.step(few, 1)
    engine.step(many, 16)
    for _ in range(200):
        engine.drafting = 1.2
        engine.step(few)
        engine.drafting = 9.0
        engine.step(many)
    ranges = {tuple(r["requests"]): r["drafts"] for r in engine.policy.to_json()["ranges"]}
    assert ranges == {(1, 1): True, (9, 16): False}
    engine.drafting = 1.2
    engine.step(["z"], 1, width="3")
    for _ in range(100):
        engine.step(["z"], width="3")
    by_width = {(r["bits"], *r["requests"]): r["drafts"] for r in engine.policy.to_json()["ranges"]}
    assert by_width == {("8", 1, 1): True, ("8", 9, 16): False, ("3", 1, 1): True}


def test_a_step_has_drafts_while_one_request_is_complete():
    engine = Engine()
    engine.drafting, engine.accepted = 9.0, 0
    engine.run(["a", "b", "c"], 60, new=3)
    assert not engine.step(["a", "b", "c"])
    assert not engine.step(["a", "b"])  # another range of batch sizes, but no draft model has read their last tokens
    assert engine.step(["n", "a"], new=1)
    assert engine.step(["n", "a"])
    assert not engine.step(["a"])


def test_accepted_drafts_of_incomplete_requests_are_not_counted():
    engine = Engine()
    engine.accepted = 2
    engine.run(["a"], FIRST_STEPS + 2 * TRIAL_STEPS, new=1)
    assert engine.policy.to_json()["tokens_per_request_and_step"] == {"8": 3.0}
    engine.drafting = 9.0
    engine.run(["a"], 3 * MISSED_TOKENS)  # without drafts
    engine.accepted, engine.drafting = 0, 0.5
    engine.step(["n", "a"], new=1)
    assert all(engine.step(["n", "a"]) for _ in range(10))
    assert engine.policy.to_json()["tokens_per_request_and_step"] == {"8": 3.0}
    for index in range(100):
        names = [f"b{index}", f"c{index}"]
        engine.step(names, new=2)
        engine.step(names)
    assert engine.policy.to_json()["tokens_per_request_and_step"] == {"8": 1.0}


def test_idle_time_is_no_part_of_a_step():
    engine = Engine()
    engine.drafting, engine.accepted = 1.9, 1
    engine.step(["a"], 1)
    for _ in range(100):
        engine.now += 50.0
        engine.step(["a"])
    speeds = engine.policy.to_json()["ranges"][0]["tokens_per_second"]
    assert speeds == {"drafts": pytest.approx(2 / 1.9, abs=0.01), "plain": pytest.approx(1.0, abs=0.01)}


def test_a_slow_step_changes_nothing():
    engine = Engine()
    engine.step(["a"], 1)
    for index in range(2000):
        engine.drafting, engine.plain = (40.0, 25.0) if index % 9 == 8 else (1.5, 1.0)
        engine.step(["a"])
    assert engine.policy.to_json()["changes"] == 0


def test_a_decision_depends_on_both_kinds_in_the_same_load():
    """Plain decoding becomes slower after drafts were found to be slower; only a new trial compares the two."""
    engine = Engine()
    engine.drafting, engine.accepted = 2.5, 1
    engine.run(["a"], 10 * FIRST_STEPS, new=1)
    engine.plain, engine.drafting = 3.0, 7.0
    assert engine.run(["a"], 2 * PAUSE) <= 1.1 * TRIAL_SHARE
    assert engine.policy.to_json()["changes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("drafting", [3.0, 8.0, 30.0])
def test_trials_take_a_share_of_the_time(drafting):
    """However much slower a step with drafts is: with a share of the steps alone, 8 times as slow ones would take 7 %."""
    engine = Engine()
    engine.drafting, engine.accepted = drafting, 1
    engine.run(["a"], 10 * FIRST_STEPS, new=1)
    steps = round(4.5 * PAUSE * drafting)
    begin = engine.now
    trials = engine.run(["a"], steps) * steps
    assert trials == 4 * TRIAL_STEPS
    assert trials * drafting <= 1.01 * TRIAL_SHARE * (engine.now - begin)


def test_outputs_of_empty_and_unknown_steps_are_ignored():
    engine = Engine(ahead=1)
    engine.run(["a"], 5, new=1)
    empty = SimpleNamespace(num_scheduled_tokens={}, scheduled_spec_decode_tokens={}, scheduled_new_reqs=[])
    engine.drafts.plan(empty, "8", lambda name: 0)
    engine.drafts.record(empty, [])
    assert len(engine.drafts._steps) == 1
    engine.run(["a"], 50)
    assert engine.policy.to_json()["ranges"][0]["tokens_per_second"]["drafts"] is not None
    engine.drafts.forget([])
    assert not engine.drafts._missed


costs = st.floats(0.5, 3.0)
MOST = 6  # times that a step can cost more than another
loads = st.tuples(st.integers(1, 40), costs, costs, st.integers(1, 200))  # batch size, seconds of both kinds, steps


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(script=st.lists(loads, min_size=1, max_size=5), accepted=st.integers(0, 3))
def test_against_a_plain_count_of_costs(script, accepted):
    """After any sequence of loads, the decision is that of the costs, and trials are rare."""
    policy = DraftPolicy()

    def step(batch: int, plain: float, drafting: float) -> bool:
        drafts = policy.use_drafts("8", batch, batch)
        policy.record("8", batch, drafts, *((drafting, batch * (1 + accepted)) if drafts else (plain, batch)))
        return drafts

    for batch, plain, drafting, steps in script:
        for _ in range(steps):
            step(batch, plain, drafting)
    for _ in range(2 * MOST * PAUSE + FIRST_STEPS):  # two trials
        step(batch, plain, drafting)
    speeds = {True: batch * (1 + accepted) / drafting, False: batch / plain}
    (found,) = (r for r in policy.to_json()["ranges"] if r["requests"][0] <= batch <= r["requests"][1])
    assert speeds[found["drafts"]] * MARGIN * 1.0001 >= speeds[not found["drafts"]]
    used = [step(batch, plain, drafting) for _ in range(2 * PAUSE)]
    assert used.count(not found["drafts"]) <= TRIAL_SHARE * len(used) + TRIAL_STEPS
    assert (
        max((len(list(g)) for kind, g in itertools.groupby(used) if kind != found["drafts"]), default=0) <= TRIAL_STEPS
    )


@pytest.mark.parametrize("value", ["off", None, True, 3])
def test_a_wrong_setting_is_refused(value):
    with pytest.raises(UserError, match=r"matquant.speculation must be one of adaptive, always; found"):
        WidthSettings.from_config({"matquant": {"speculation": value}}, 8)


def test_the_setting_is_adaptive_unless_it_is_named():
    found = [WidthSettings.from_config({"matquant": s}, 8).speculation for s in ({}, {"speculation": "always"})]
    assert found == ["adaptive", "always"]
