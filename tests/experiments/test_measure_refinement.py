"""Script that measures the refinement of an 8B shape: a small model end to end, its arithmetic, and what it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared import ROOT, load_script

from matquant.refine.config import RefineConfig

FOLDER = ROOT / "experiments" / "benchmarks"
SMALL = ["--blocks", "2", "--width", "0.015625", "--vocabulary", "2048"]
TEXT = [
    "refine.text.sequences=8",
    "refine.text.sequence_length=16",
    "refine.text.seed=null",
    "refine.text.batch_size=2",
]
TEXT += ["refine.validation_sequences=2", "runtime.device=cpu", "runtime.threads=1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "measure_refinement.py")


def call(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_refinement.py", *arguments])
    script.main()


def timeline(script: Any, *events: tuple[str, float], device: str = "cpu", memory: list[dict] | None = None) -> Any:
    made = script.Timeline(torch.device(device), lambda: None)
    rows = memory or [{} for _ in events]
    made.events += [{"event": name, "seconds": s} | row for (name, s), row in zip(events, rows, strict=True)]
    return made


@pytest.mark.slow
def test_the_refinement_of_a_small_model_is_measured(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    call(script, monkeypatch, str(tmp_path / "work"), "--out", str(out), "--steps", "4", *SMALL, *TEXT)
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["refinements"]) == ["scales"]
    record = found["refinements"]["scales"]
    events = [row["event"] for row in record["events"]]
    end = ["validation", "save", "write a block", "write a block", "commit"]
    assert events == ["start and validation", *["step"] * 4, *end]
    assert record["extrapolated"]["steps"] == 600
    assert record["extrapolated"]["validations"] == 12
    assert record["planned"]["host"] > 0
    assert (record["ratio"], record["goals"]) == (None, {"memory": None, "minutes": True})
    assert [one["step"] for one in record["history"]] == [0, 4]
    assert record["planned"]["disk"] > 2 * record["saved_bytes"]  # of the whole job, which saves more than once
    assert "refine=scales: plan: " in shown
    assert "600 steps in" in shown
    assert not list((tmp_path / "work" / "store").glob("refined*"))
    assert not list((tmp_path / "work" / "store").glob("tmp*"))
    assert found["provenance"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("steps", "every", "validations"), [(600, 50, 12), (101, 50, 3), (3, 10, 1)])
def test_the_whole_job_is_a_sum_of_its_parts(script: Any, steps: int, every: int, validations: int) -> None:
    measured = timeline(
        script,
        ("start and validation", 9.0),
        ("step", 5.0),
        ("step", 3.0),
        ("step", 2.0),
        ("step", 2.5),
        ("step", 2.0),
        ("validation", 4.0),
        ("save", 7.0),
        ("write a block", 1.0),
        ("write a block", 1.5),
        ("commit", 0.5),
    )
    whole = script.extrapolate(measured, RefineConfig(method="scales", steps=steps, validate_every=every))
    first, later = 9.0 + 5.0 + 3.0, (steps - 2) * 2.0
    seconds = first + later + validations * (4.0 + 7.0) + 1.0 + 1.5 + 0.5
    assert sum(whole["seconds"].values()) == pytest.approx(seconds)
    assert whole["minutes"] == pytest.approx(seconds / 60, abs=0.01)
    assert (whole["seconds_per_step"], whole["slowest_step"]) == (2.0, 2.5)


@pytest.mark.parametrize(
    ("kept", "needed"),
    [((0, 0, 0), 20), ((0, 4, 4), 22), ((3, 0, 0), 23)],
    ids=["no graphs", "captured in the second event", "captured in the first event"],
)
def test_memory_that_graphs_keep_counts_from_the_event_after_their_capture(
    script: Any, kept: tuple[int, ...], needed: int
) -> None:
    rows = [
        {"allocated": allocated, "reserved": 30, "device_used": 40, "kept_by_graphs": one}
        for allocated, one in zip((10, 20, 18), kept, strict=True)
    ]
    measured = timeline(script, ("start", 1.0), ("step", 1.0), ("step", 1.0), device="cuda", memory=rows)
    assert measured.peaks() == {"allocated": 20, "reserved": 30, "device_used": 40, "needed": needed}


@pytest.mark.parametrize(
    ("allocated", "minutes", "memory", "time"),
    [(90, 90, True, True), (80, 100, False, False), (116, 89, False, True), (114, 91, True, False)],
)
def test_memory_within_15_percent_and_time_within_the_limit_meet_the_goals(
    script: Any, allocated: int, minutes: float, memory: bool, time: bool
) -> None:
    events = [("start and validation", 0.0), *[("step", minutes * 60 / 10)] * 10, ("validation", 0.0), ("save", 0.0)]
    row = {"allocated": allocated, "reserved": 200, "device_used": 300, "kept_by_graphs": 0}
    measured = timeline(script, *events, device="cuda", memory=[row] * len(events))
    plan = SimpleNamespace(device_peak=100, host_peak=1, disk=1, seconds=1.0)
    found = script.summarize(measured, plan, RefineConfig(method="scales", steps=10))
    assert found["goals"] == {"memory": memory, "minutes": time}
    assert (found["ratio"], found["ratios"]["reserved"]) == (allocated / 100, 2.0)
    assert f"{allocated / 100:.3f} of the plan" in script.describe(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps must be more than 2"),
        (["refine.steps=0"], "refine.steps must be at least 1"),
        (["--model", "missing"], "missing"),
        (["--out", "no/folder/found.json"], "no/folder is no folder"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as error:
        call(script, monkeypatch, str(tmp_path), "--out", str(tmp_path / "found.json"), *SMALL, *arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert error.value.code not in (0, None)
