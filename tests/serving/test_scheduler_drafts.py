"""Drafts of the scheduler's steps: left out where they cost more, by a clock that the tests move."""

import importlib.util
from typing import Any

import pytest
from scheduling import Engine, pack_tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return pack_tiny(tmp_path_factory.mktemp("scheduler"))


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

    from matquant.vllm import prometheus

    engine = Speculative(folder, costs)
    engine.add(5, tokens=80)
    engine.run()
    state = engine.scheduler._state(None)
    prometheus.update(state)
    labels = {"bits": "5", "requests": "1-1"}
    assert REGISTRY.get_sample_value("matquant_drafting", labels) == drafting
    for kind, speed in (("drafts", 3 / costs[0]), ("plain", 1.0)):
        found = REGISTRY.get_sample_value("matquant_measured_tokens_per_second", labels | {"kind": kind})
        assert found == pytest.approx(speed, abs=0.01)
    before = REGISTRY.get_sample_value("matquant_drafting_changes_total")
    state["speculation"]["changes"] += 2
    prometheus.update(state)
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
