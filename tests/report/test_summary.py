import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from matquant.report import JobResults, write, write_report
from matquant.report.summary import summarize
from matquant.report.summary_table import print_summary
from matquant.report.sweep import curves, read_jobs

pytestmark = pytest.mark.slow

APP = """
import dataclasses, json, os, sys
import hydra
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from matquant.report import load, write

@hydra.main(version_base="1.3", config_path=".", config_name="config")
def run(cfg):
    if cfg.method.name == "bad":
        raise ValueError("this method is <b>bad</b>")
    if cfg.method.name == "exit":
        sys.exit(3)
    results = load(Path(os.environ["SAMPLE"]))
    slices = [s for s in results.slices if s.bits == cfg.bits or cfg.bits is None]
    results = dataclasses.replace(results, slices=slices, method=cfg.method.name)
    write(results, Path(HydraConfig.get().runtime.output_dir))

if __name__ == "__main__":
    run()
"""
APP_CONFIG = {
    "method": {"name": "matgptq"},
    "bits": None,
    "hydra": {
        "sweep": {"dir": "sweep", "subdir": "${hydra.job.num}"},
        "callbacks": {"summary": {"_target_": "matquant.report.summary.SummaryCallback"}},
    },
}


def add_job(folder, name, overrides, results=None, config=None):
    hydra = folder / name / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (hydra / "config.yaml").write_text(yaml.safe_dump(config or {"method": {"name": "unknown"}}))
    if results is not None:
        write(JobResults.from_json(results), folder / name)


def read_csv(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def printed(folder, width=80):
    buffer = io.StringIO()
    print_summary(read_jobs(folder), folder / "summary.html", Console(file=buffer, width=width))
    return buffer.getvalue()


def with_objective(results, name):
    return results | {"config": results["config"] | {"objective": {"name": name}}}


def test_csv_has_a_row_per_job_and_slice(make_results, tmp_path):
    add_job(tmp_path, "10", ["method=rtn"], make_results("rtn", (2, 4)))
    add_job(tmp_path, "2", ["method=matgptq", "objective=low_bit"], make_results(bits=(2,), allocation=True))
    returned = summarize(tmp_path)
    found = read_csv(tmp_path)
    assert list(found[0]) == [
        "job",
        "overrides",
        "model",
        "method",
        "status",
        "bits",
        "average_bits",
        "bytes",
        "perplexity_stdlib",
        "kl_stdlib",
        "seconds_quantize",
        "reused",
        "parent_sha256",
        "error",
    ]
    assert [(row["job"], row["bits"]) for row in found] == [("2", "2"), ("2", "allocation"), ("10", "2"), ("10", "4")]
    assert found[1] == {
        "job": "2",
        "overrides": "method=matgptq objective=low_bit",
        "model": "tiny",
        "method": "matgptq",
        "status": "done",
        "bits": "allocation",
        "average_bits": "2.5",
        "bytes": "312500",
        "perplexity_stdlib": "7.5",
        "kl_stdlib": "0.5",
        "seconds_quantize": "12.5",
        "reused": "False",
        "parent_sha256": "ab" * 32,
        "error": "",
    }
    assert [row["kl_stdlib"] for row in returned] == [1.0, 0.5, 1.0, 0.0625]


def test_jobs_of_other_datasets_share_the_columns(make_results, tmp_path):
    add_job(tmp_path, "0", [], make_results(bits=(2,), datasets=("a",)))
    add_job(tmp_path, "1", [], make_results(bits=(2,), datasets=("b",)))
    summarize(tmp_path)
    found = read_csv(tmp_path)
    assert [(row["kl_a"], row["kl_b"]) for row in found] == [("1.0", ""), ("", "1.0")]
    page = (tmp_path / "summary.html").read_text()
    assert "On a<" in page
    assert "On b<" in page


def test_per_bit_models_have_their_own_sums(make_results, tmp_path):
    models = {str(bits): {"sha256": str(bits) * 64, "reused": bits == 3, "bytes": 1} for bits in (2, 3)}
    add_job(tmp_path, "0", [], make_results("gptq", (2, 3), parent={"models": models}))
    rows = summarize(tmp_path)
    assert [(row["parent_sha256"], row["reused"]) for row in rows] == [("2" * 64, False), ("3" * 64, True)]


def test_failed_jobs_are_not_lost(make_results, tmp_path):
    add_job(tmp_path, "0", ["method=rtn"], make_results("rtn"))
    add_job(tmp_path, "1", ["method=bad"], None, {"method": {"name": "bad"}, "model": {"label": None, "name": "org/m"}})
    (tmp_path / "1" / "error.txt").write_text("ValueError: <script>no</script>\n")
    add_job(tmp_path, "2", ["method=gone"])
    add_job(tmp_path, "3", ["method=half"])
    (tmp_path / "3" / "results.json").write_text('{"schema": 1')
    failed = [row for row in summarize(tmp_path) if row["status"] == "failed"]
    assert [(row["job"], row["method"], row["model"], row["bits"]) for row in failed] == [
        ("1", "bad", "m", None),
        ("2", "unknown", "", None),
        ("3", "unknown", "", None),
    ]
    errors = [row["error"] for row in failed]
    assert errors[0] == "ValueError: <script>no</script>"
    assert "left no results" in errors[1]
    assert "cannot be read as JSON" in errors[2]

    page = (tmp_path / "summary.html").read_text()
    assert "1 of 4 jobs done" in page
    assert "ValueError: &lt;script&gt;no&lt;/script&gt;" in page
    assert "<script" not in page
    text = printed(tmp_path)
    assert "job 1 failed: ValueError: <script>no</script>" in text
    assert "1 of 4 jobs done." in text


def test_results_from_before_the_sweep_do_not_count_for_a_job_that_was_started_again(make_results, tmp_path):
    for name in ("0", "1"):
        add_job(tmp_path, name, [], make_results(bits=(2,)))
        os.utime(tmp_path / name / "results.json", (1000, 1000))
    os.utime(tmp_path / "1" / ".hydra" / "overrides.yaml", (900, 900))  # not started again
    assert [job.status for job in read_jobs(tmp_path, since=2000.0)] == ["failed", "done"]
    assert [job.status for job in read_jobs(tmp_path)] == ["done", "done"]


def test_finds_nested_jobs_and_leaves_their_insides_alone(make_results, tmp_path):
    add_job(tmp_path, "method=rtn/bits=2", ["method=rtn"], make_results("rtn"))
    add_job(tmp_path, "method=rtn/bits=2/wandb/inner", [], make_results())
    write(JobResults.from_json(make_results()), tmp_path / ".cache")
    write(JobResults.from_json(make_results("bare")), tmp_path / "without-hydra")
    assert [job.name for job in read_jobs(tmp_path)] == ["method=rtn/bits=2", "without-hydra"]


def test_jobs_that_differ_by_widths_only_are_one_line(make_results, tmp_path):
    for bits in (2, 3, 4):
        add_job(tmp_path, str(bits), [f"bits={bits}"], make_results(bits=(bits,)))
    (line,) = curves(read_jobs(tmp_path))
    assert line.name == "matgptq"
    assert [one.bits for one in line.slices] == [2, 3, 4]


def test_lines_are_named_by_what_tells_them_apart(make_results, tmp_path):
    plain = make_results()
    small = plain | {"config": plain["config"] | {"method": {"name": "matgptq", "group_size": 32}}}
    add_job(tmp_path, "0", [], make_results("rtn"))
    add_job(tmp_path, "1", [], plain)
    add_job(tmp_path, "2", [], with_objective(plain, "low_bit"))
    add_job(tmp_path, "3", [], small)
    assert [line.name for line in curves(read_jobs(tmp_path))] == [
        "rtn",
        "matgptq, balanced, method.group_size=128",
        "matgptq, low_bit, method.group_size=128",
        "matgptq, balanced, method.group_size=32",
    ]
    add_job(tmp_path, "4", [], make_results("rtn", model="other"))
    assert [line.name for line in curves(read_jobs(tmp_path))][::4] == ["rtn, tiny", "rtn, other"]


def test_page_compares_links_and_needs_no_network(make_results, tmp_path):
    for index, (method, scale) in enumerate((("rtn", 2.0), ("matgptq", 1.0))):
        name = f"{index} a&b"
        add_job(tmp_path, name, [f"method={method}", "eval=short"], make_results(method, scale=scale))
        write_report(JobResults.from_json(make_results(method)), tmp_path / name)
    summarize(tmp_path)
    page = (tmp_path / "summary.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert 'href="0%20a%26b/report.html"' in page
    assert "All jobs have eval=short." in page
    assert '<strong class="best">1.00</strong>' in page
    assert '<strong class="best">2.00</strong>' not in page
    first = (tmp_path / "summary.html").read_bytes()
    summarize(tmp_path)
    assert (tmp_path / "summary.html").read_bytes() == first


def test_terminal_table_of_methods_and_of_widths(make_results, tmp_path):
    methods, widths = tmp_path / "methods", tmp_path / "widths"
    for index, method in enumerate(("rtn", "gptq", "matgptq_v1", "matgptq")):
        results = make_results(method, (2, 3, 4, 6, 8), allocation=True)
        add_job(methods, str(index), [f"method={method}", "eval=x"], results)
    text = printed(methods)
    assert max(map(len, text.splitlines()[:-1])) <= 80
    row = next(line.split() for line in text.splitlines() if "matgptq_v1" in line)
    assert row == ["2", "matgptq_v1", "1.00", "0.250", "0.0625", "0.00391", "0.000244", "0.500"]
    assert text.splitlines()[-1] == f"summary: {methods / 'summary.html'}"

    for bits in (2, 3):
        add_job(widths, str(bits), [f"bits={bits}"], make_results(bits=(bits,)))
    rows = [line.split() for line in printed(widths).splitlines()]
    assert ["3", "matgptq", "bits=3", "3", "0.250", "7.250"] in rows


def test_an_empty_folder_has_an_empty_summary(tmp_path):
    assert summarize(tmp_path) == []
    assert "0 of 0 jobs done" in (tmp_path / "summary.html").read_text()


def run_app(folder, results, *arguments):
    (folder / "app.py").write_text(APP)
    (folder / "config.yaml").write_text(yaml.safe_dump(APP_CONFIG))
    write(JobResults.from_json(results), folder / "sample")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"SAMPLE": str(folder / "sample"), "PYTHONPATH": root, "COLUMNS": "100"}
    command = [sys.executable, "app.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_hydra_sweep_ends_with_a_summary(make_results, tmp_path):
    done = run_app(tmp_path, make_results(), "-m", "bits=2,3,4")
    assert done.returncode == 0, done.stderr
    found = read_csv(tmp_path / "sweep")
    assert [(row["overrides"], row["bits"]) for row in found] == [("bits=2", "2"), ("bits=3", "3"), ("bits=4", "4")]
    assert done.stdout.splitlines()[-1] == f"summary: {tmp_path / 'sweep' / 'summary.html'}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_with_a_failing_job_is_summarized(make_results, tmp_path, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ["-m", "method.name=rtn,bad,matgptq", f"hydra/launcher={launcher}"]
    done = run_app(tmp_path, make_results(bits=(2,)), *arguments)
    assert done.returncode == 1
    found = read_csv(tmp_path / "sweep")
    assert [(row["method"], row["status"]) for row in found] == [
        ("rtn", "done"),
        ("bad", "failed"),
        ("matgptq", "done"),
    ]
    assert found[1]["error"] == "ValueError: this method is <b>bad</b>"
    assert "job 1 failed: ValueError: this method is <b>bad</b>" in done.stdout


def test_a_sweep_that_a_job_ends_is_summarized(make_results, tmp_path):
    assert run_app(tmp_path, make_results(), "-m", "method.name=rtn,exit,matgptq").returncode == 3
    found = read_csv(tmp_path / "sweep")
    assert [row["status"] for row in found if row["bits"] in ("2", "")] == ["done", "failed"]


def test_a_single_run_has_no_summary(make_results, tmp_path):
    done = run_app(tmp_path, make_results(), "hydra.run.dir=single")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("summary.*"))
    assert "summary" not in done.stdout
