"""Outputs of a job: places that cannot be written are refused before work, and a failed stage loses no earlier result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared import SMALL

from matquant.errors import UserError
from matquant.pack.config import PackConfig
from matquant.pack.stage import try_target
from matquant.report.summary import summarize
from matquant.store.files import try_writing

LONG = "x" * 300  # no file system takes a name of this length


@pytest.fixture
def small(small_model: Path) -> tuple[str, ...]:
    return (*SMALL, f"model.path={small_model}", "method=rtn", "method.per_bit_models=false", "method.group_size=64")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a job comes as far as its model."""
    monkeypatch.setattr("matquant.stages.job.load_job", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["pack=nested", "pack.path={file}/below"], "pack.path"),
        (["pack=nested", f"pack.path={{folder}}/{LONG}/model"], "pack.path"),
        (["pack=gptq", "pack.path=/proc/nothing/here"], "pack.path"),
        (["pack=nested", "pack.path=/proc", "pack.overwrite=true"], "is a mount point"),
        (["store.path={file}/below"], "store.path"),
        (["store.path=/proc/nothing/here"], "store.path"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    matquant, small, no_work, tmp_path: Path, overrides: list[str], named: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    status, _, err = matquant(*small, *(o.format(file=file, folder=tmp_path) for o in overrides))
    assert status == 2
    assert named in err
    assert "Traceback" not in err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("folder", ["/proc/nothing/here", "{file}/below", "{file}", f"{{folder}}/{LONG}"])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_run_folder_that_cannot_be_made_is_a_sentence(
    matquant, monkeypatch, tmp_path: Path, folder: str, sweep: bool
) -> None:
    (tmp_path / "file").write_text("")
    folder = folder.format(file=tmp_path / "file", folder=tmp_path)
    monkeypatch.setattr("matquant.stages.job.load_job", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    # The fixture gives both folders after the overrides; the last value counts.
    for place in ("run", "sweep"):
        (tmp_path / place).symlink_to(folder)
    status, _, err = matquant(*(["-m", "bits=2,3"] if sweep else []), *SMALL)
    assert status == 2
    assert "the output folder cannot be written" in err
    assert "hydra.run.dir" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["matquant.log", ".hydra"])
def test_a_file_in_the_run_folder_that_cannot_be_written_is_a_sentence(matquant, tmp_path: Path, name: str) -> None:
    blocked = tmp_path / "run" / name
    if name == ".hydra":
        blocked.parent.mkdir()
        blocked.write_text("")
    else:
        blocked.mkdir(parents=True)
    status, _, err = matquant(*SMALL)
    assert status == 2
    assert f"the output folder cannot be written ({blocked}" in err
    assert "Traceback" not in err


def test_an_output_folder_in_use_is_tried_without_changing_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    settings = PackConfig(name="nested", path=str(tmp_path / "model"), overwrite=True)
    try_target(settings, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    with pytest.raises(UserError, match="is there already"):
        try_target(PackConfig(name="nested", path=str(tmp_path / "model")), tmp_path)
    try_target(PackConfig(name="nested", path=str(tmp_path / "new" / "model")), tmp_path)
    assert not (tmp_path / "new" / "model").exists()


def test_nothing_remains_of_a_folder_that_was_tried(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("old", "old/new", "new/deep/folder"):
        try_writing(tmp_path / folder, "store.path")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in ("link", "old/" + LONG, "new/" + LONG + "/x"):
        with pytest.raises(UserError, match="cannot use .*store.path"):
            try_writing(tmp_path / folder, "store.path")


def fail_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("matquant.pack.stage.Packing.run", run)


def fail_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("matquant.stages.job.generate", generate)


def fail_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def score_tasks(*_: Any) -> Any:
        yield "full", {"stdlib_choice": {"acc": 0.5}}
        yield "2", {"stdlib_choice": {"acc": 0.25}}
        raise KeyboardInterrupt

    monkeypatch.setattr("matquant.stages.job.score_tasks", score_tasks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "overrides", "stage", "error"),
    [
        (fail_to_pack, ["pack=nested"], "pack", "the disk is full"),
        (
            fail_to_generate,
            ["stages=[quantize,evaluate,generate]", "prompt=def"],
            "generate",
            "RuntimeError: out of memory",
        ),
        (fail_a_task, [], "tasks", "interrupted"),
    ],
)
def test_a_failed_stage_loses_no_earlier_result(
    matquant, small, monkeypatch, tmp_path: Path, fail: Callable, overrides: list[str], stage: str, error: str
) -> None:
    fail(monkeypatch)
    if stage == "generate":
        with pytest.raises(RuntimeError, match="out of memory"):
            matquant(*small, *overrides, "bits=[2,8]")
    else:
        status, out, err = matquant(*small, *overrides, "bits=[2,8]")
        assert status == {"pack": 2, "tasks": 130}[stage], err
        assert f"Stage {stage} failed: {error}" in " ".join(out.split())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failure"] == {"stage": stage, "error": error}
    assert [entry["bits"] for entry in results["slices"]] == [2, 8]
    assert results["slices"][0]["kl"]["stdlib"] > results["slices"][1]["kl"]["stdlib"] > 0
    assert len(results["layers"]) == 28
    scored = [bool(entry["tasks"]) for entry in (results["baseline"], *results["slices"])]
    assert scored == ([True, True, False] if stage == "tasks" else [False] * 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Stage {stage} failed: {error}" in page


@pytest.mark.slow
def test_a_failed_evaluation_keeps_the_allocations_of_the_search(matquant, small, monkeypatch, tmp_path: Path) -> None:
    def evaluate(*_: Any) -> Any:
        yield from ()
        raise UserError("the logits hold NaN")

    monkeypatch.setattr("matquant.stages.job.evaluate", evaluate)
    status, _, err = matquant(*small, "bits=[2,8]", "search.average_bits=3", "search.sequences=2", "search=sensitivity")
    assert status == 2
    assert "the logits hold NaN" in err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failure"]["stage"] == "evaluate"
    assert (tmp_path / "run" / "allocation.yaml").is_file()


@pytest.mark.slow
def test_a_sweep_keeps_the_figures_of_a_failed_job(matquant, small, monkeypatch, tmp_path: Path) -> None:
    fail_to_pack(monkeypatch)
    status, out, _ = matquant("-m", *small, "bits=2,8", "pack=nested,none")
    assert status == 2
    rows = summarize(tmp_path / "sweep")
    assert sorted((row["bits"], row["status"]) for row in rows) == [
        (2, "done"),
        (2, "failed"),
        (8, "done"),
        (8, "failed"),
    ]
    assert all(row["kl_stdlib"] > 0 for row in rows)
    assert "the disk is full" in out


@pytest.mark.slow
def test_results_that_cannot_be_written_are_shown(matquant, small, monkeypatch, tmp_path: Path) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matquant.report.write", write)
    status, out, err = matquant(*small, "bits=[2,8]")
    assert status == 2
    assert "is full at" in err
    assert "perplexity" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine", "my-model.v2"])
def test_table_and_report_name_the_model_that_was_used(matquant, small_model, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(small_model, tmp_path / name)
    status, out, err = matquant(
        *SMALL, f"model.path={folder}", "method=rtn", "method.group_size=64", "bits=4", "stages=[quantize]"
    )
    assert status == 0, err
    assert f"{name} rtn" in out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["model"] == name
    assert f"<title>{name} rtn</title>" in (tmp_path / "run" / "report.html").read_text()
