import json
import logging
import os
import subprocess

import pytest
import wandb
from offline_runs import read_run, records
from shared import SMALL

from matquant.config import TrackingConfig
from matquant.report import JobResults, track

pytestmark = pytest.mark.slow

CONFIG = TrackingConfig(wandb=True, project="matquant", group=None, tags=("one", "two"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def git(*arguments: str) -> str:
    flags = ("-c", "user.name=A", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *flags, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_the_machine_and_what_the_job_took_are_in_the_run(make_results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    search = {"method": "hybrid", "seconds": 2.5, "evaluations_per_second": 40.0, "tokens_per_second": 9000.0}
    results = make_results(bits=(2,), layers=[], search=search, resources={"host_peak": 7, "device_peak": None})
    assert track(JobResults.from_json(results), CONFIG, tmp_path / "run", None, "x") is None
    run = read_run(tmp_path / "run")
    assert run["commit"] == git("rev-parse", "HEAD")
    assert run["cores"] == os.cpu_count()
    assert (run["summary"]["memory/host_peak"], run["summary"]["search/evaluations_per_second"]) == (7, 40.0)
    assert "memory/device_peak" not in run["summary"]


def test_a_run_reads_back(make_results, tmp_path, capfd):
    assert track(JobResults.from_json(make_results(allocation=True)), CONFIG, tmp_path, "sweep-7", "job-3") is None
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""

    run = read_run(tmp_path)
    assert (run["project"], run["group"], run["name"], run["tags"]) == ("matquant", "sweep-7", "job-3", ["one", "two"])
    assert run["config"]["method"] == {"name": "matgptq", "group_size": 128}
    assert run["config"]["command"] == "python run.py method=matgptq"
    assert run["metrics"] == {"slice/bits": "", "slice/*": "slice/bits"}

    widths = [row for row in run["history"] if "slice/bits" in row]
    figures = [
        (row["_step"], row["slice/bits"], row["slice/kl/stdlib"], row["slice/perplexity/stdlib"]) for row in widths
    ]
    assert figures == [(2, 2, 1.0, 8.0), (3, 3, 0.25, 7.25), (4, 4, 0.0625, 7.0625)]
    assert [row["allocation/kl/stdlib"] for row in run["history"] if "allocation/bits" in row] == [0.5]

    summary = run["summary"]
    assert (summary["kl/2"], summary["kl/allocation"], summary["bytes/4"]) == (1.0, 0.5, 500_000)
    assert summary["seconds/quantize"] == 12.5
    assert summary["parent/sha256"] == "ab" * 32
    assert summary["slices/nrows"] == 5
    assert summary["layers/nrows"] == 6
    assert summary["report/_type"] == "html-file"
    assert summary["plots/kl_bits/_type"] == "image-file"
    assert summary["plots/layer_error_2/_type"] == "image-file"
    for key in ("slices/path", "layers/path", "report/path", "plots/kl_bits/path"):
        (files,) = tmp_path.glob("wandb/offline-run-*/files")
        assert (files / summary[key]).is_file()


def test_two_runs_in_one_process_share_a_group_and_leave_nothing_behind(make_results, tmp_path):
    before = dict(os.environ)
    for index, method in enumerate(("rtn", "matgptq")):
        assert (
            track(
                JobResults.from_json(make_results(method, layers=[])),
                CONFIG,
                tmp_path / str(index),
                "sweep",
                f"job-{index}",
            )
            is None
        )
    first, second = read_run(tmp_path / "0"), read_run(tmp_path / "1")
    assert first["group"] == second["group"] == "sweep"
    assert first["id"] != second["id"]
    assert (first["name"], second["name"]) == ("job-0", "job-1")
    assert (first["summary"]["method"], second["summary"]["method"]) == ("rtn", "matgptq")
    assert wandb.run is None
    assert dict(os.environ) == before


def test_the_configured_group_goes_first_and_folders_are_made(make_results, tmp_path):
    config = TrackingConfig(wandb=True, project="p", group="mine", tags=())
    assert (
        track(JobResults.from_json(make_results(bits=(2,), layers=[])), config, tmp_path / "a" / "b", "sweep", "x")
        is None
    )
    assert read_run(tmp_path / "a" / "b")["group"] == "mine"


def test_several_datasets_have_a_mean(make_results, tmp_path):
    results = make_results(bits=(2,), datasets=("a", "b"), layers=[])
    results["slices"][0]["kl"] = {"a": 1.0, "b": 2.0}
    assert track(JobResults.from_json(results), CONFIG, tmp_path, None, "x") is None
    assert read_run(tmp_path)["summary"]["kl/2"] == 1.5


def test_a_failure_is_one_warning(make_results, tmp_path, monkeypatch, caplog):
    def refuse(**_):
        raise RuntimeError("the server\nsaid no")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        sentence = track(JobResults.from_json(make_results()), CONFIG, tmp_path, None, "x")
    assert sentence.startswith("Weights & Biases did not record this run")
    assert "the server said no" in sentence
    assert [record.getMessage() for record in caplog.records] == [sentence]


def test_a_failure_halfway_finishes_the_run(make_results, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("matquant.report.tracking._media", fail)
    assert "MemoryError" in track(JobResults.from_json(make_results()), CONFIG, tmp_path, None, "x")
    assert wandb.run is None
    assert "WANDB_SERVICE" not in os.environ


def test_a_folder_that_cannot_be_is_a_warning(make_results, tmp_path):
    (tmp_path / "file").write_text("")
    assert "did not record" in track(JobResults.from_json(make_results()), CONFIG, tmp_path / "file", None, "x")


@pytest.mark.parametrize("switch", ["config", "environment"])
def test_can_be_switched_off(make_results, tmp_path, monkeypatch, switch):
    monkeypatch.setenv("WANDB_MODE", "disabled" if switch == "environment" else "offline")
    config = TrackingConfig(wandb=switch == "environment", project="p", group=None, tags=())
    assert track(JobResults.from_json(make_results()), config, tmp_path, None, "x") is None
    assert list(tmp_path.iterdir()) == []


def test_a_search_reads_back_with_its_curve_and_its_allocation(make_results, tmp_path):
    results = make_results(allocation=True)
    widths = {row["name"]: 2 + index % 3 for index, row in enumerate(results["layers"])}
    results["slices"][-1] |= {"name": "allocation.yaml", "allocation": {"method": "hybrid", "widths": widths}}
    history = [
        {"budget": "2.5 bits", "generation": g, "loss": 1.0 / g, "evaluations": 8, "tokens": 512, "skipped": 40}
        for g in (1, 2, 3)
    ]
    results["search"] = {"method": "hybrid", "fitness": "kl", "evaluations": 24, "tokens": 1536, "history": history}
    assert track(JobResults.from_json(results), CONFIG, tmp_path, "sweep", "x") is None
    run = read_run(tmp_path)
    assert run["metrics"]["search/*"] == "search/generation"
    assert run["metrics"]["allocation/*"] == "allocation/bits"
    curve = [row for row in run["history"] if "search/generation" in row]
    assert [(row["search/generation"], row["search/loss/2.5 bits"]) for row in curve] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]
    assert run["summary"]["plots/allocation_0/_type"] == "image-file"
    assert run["summary"]["plots/generations/_type"] == "image-file"
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    artifacts = [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    artifacts += [
        r.request.log_artifact.artifact
        for r in records(path)
        if r.WhichOneof("record_type") == "request" and r.request.WhichOneof("request_type") == "log_artifact"
    ]
    (artifact,) = [a for a in artifacts if a.type == "allocation"]
    assert [entry.path for entry in artifact.manifest.contents] == ["allocation.yaml"]


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_one_group_and_complete(matquant, small_model, tmp_path):
    job = (*SMALL, f"model.path={small_model}", "method=rtn", "method.per_bit_models=false", "method.group_size=64")
    status, out, err = matquant("-m", "bits=2,4", *job, "tracking=wandb", "tracking.tags=[a]")
    assert status == 0, err
    assert "summary.html" in out
    runs = [read_run(tmp_path / "sweep" / number) for number in "01"]
    assert len({run["group"] for run in runs}) == 1
    assert runs[0]["group"]
    assert len({run["id"] for run in runs}) == 2
    for run, number, bits in zip(runs, "01", (2, 4), strict=True):
        results = json.loads((tmp_path / "sweep" / number / "results.json").read_text())
        assert run["config"]["bits"] == bits
        assert run["tags"] == ["a"]
        assert run["summary"][f"kl/{bits}"] == results["slices"][0]["kl"]["stdlib"]
        assert run["summary"]["parent/sha256"] == results["parent"]["sha256"]
        assert [row["slice/bits"] for row in run["history"] if "slice/bits" in row] == [bits]
