import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from matquant.errors import UserError
from matquant.report import JobResults, ResultsError, load, write
from matquant.report.results import ParentRecord, task_scores


def test_reads_back_what_was_written_from_folder_and_file(make_results, tmp_path):
    results = make_results(allocation=True)
    path = write(JobResults.from_json(results), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "results.json"
    assert load(path) == load(path.parent) == JobResults.from_json(results)
    stored = json.loads(path.read_text())
    assert {key: stored[key] for key in results if key not in ("slices", "layers", "baseline")} == {
        key: results[key] for key in results if key not in ("slices", "layers", "baseline")
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_json_cannot_hold_and_names_the_field(make_results, tmp_path, value):
    results = make_results()
    results["slices"][1]["kl"]["stdlib"] = value
    with pytest.raises(ResultsError, match=r"slices\[1\]\.kl\.stdlib is -?(nan|inf)"):
        write(JobResults.from_json(results), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_nan_deep_in_the_config(make_results, tmp_path):
    with pytest.raises(ResultsError, match=r"config\.a\.b\[1\] is nan"):
        write(JobResults.from_json(make_results(config={"a": {"b": [1, float("nan")]}})), tmp_path)


def test_refuses_objects(make_results, tmp_path):
    with pytest.raises(ResultsError, match=r"config\.path is a PosixPath"):
        write(dataclasses.replace(JobResults.from_json(make_results()), config={"path": Path("x")}), tmp_path)


def test_a_failed_write_leaves_the_old_file(make_results, tmp_path):
    write(JobResults.from_json(make_results()), tmp_path)
    with pytest.raises(ResultsError):
        write(JobResults.from_json(make_results(seconds={"quantize": float("nan")})), tmp_path)
    assert load(tmp_path).seconds["quantize"] == 12.5
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_path_that_is_no_utf8_reads_back(make_results, tmp_path):
    write(JobResults.from_json(make_results(command="run.py model.path=a\udcff")), tmp_path)
    assert load(tmp_path).command == "run.py model.path=a\udcff"


def test_a_figure_that_was_not_measured_is_null(make_results, tmp_path):
    results = make_results()
    results["slices"][0]["perplexity"]["stdlib"] = None
    assert json.loads(write(JobResults.from_json(results), tmp_path).read_text())["slices"][0]["perplexity"] == {
        "stdlib": None
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 2}, "schema must be 1"),
        ({"model": None}, "model must be a text; found None"),
        ({"slices": {}}, "slices must be a list"),
        ({"slices": [{"bits": "two"}]}, r"slices\[0\]\.bits must be a whole number"),
        ({"slices": [{"bits": "allocation"}]}, r"slices\[0\]\.average_bits must be a number"),
        ({"slices": [{"bits": 2, "kl": {"stdlib": "low"}}]}, r"slices\[0\]\.kl\.stdlib must be a number"),
        ({"slices": [{"bits": 2, "kl": 0.5}]}, r"slices\[0\]\.kl must map a dataset"),
        ({"baseline": {"perplexity": 7.0}}, r"baseline\.perplexity must map"),
        ({"layers": [{"block": 0}]}, r"layers\[0\] must be a mapping with a name"),
        ({"seconds": {"quantize": "long"}}, r"seconds\.quantize must be a number"),
        ({"warnings": "none"}, "warnings must be a list"),
    ],
)
def test_says_what_is_wrong(make_results, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        write(JobResults.from_json(make_results(**change)), tmp_path)


def test_what_cannot_be_read_is_a_sentence_with_the_path(make_results, tmp_path):
    with pytest.raises(ResultsError, match=r"There is no .*results\.json"):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1, ')
    with pytest.raises(ResultsError, match=r"results\.json cannot be read as JSON"):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1}')
    with pytest.raises(ResultsError, match=r"results\.json: model must be a text"):
        load(tmp_path)


def test_absent_fields_get_defaults_and_keys_become_texts():
    bare = {"schema": 1, "model": "m", "method": "rtn", "slices": [], "config": {"weights": {2: 1}}}
    results = JobResults.from_json(bare)
    assert list(results.layers) == []
    assert results.parent == ParentRecord()
    assert results.config == {"weights": {"2": 1}}
    assert "layers" not in bare


def test_results_of_older_versions_are_read(make_results):
    old = make_results(left_alone=[{"name": "lm_head.weight"}])
    old["slices"].append(
        {"bits": "allocation", "average_bits": 2.5, "name": "a.yaml", "allocation": {"widths": {"q": 2}}}
    )
    results = JobResults.from_json(old)
    assert list(results.unquantized) == [{"name": "lm_head.weight"}]
    assert results.allocations[0].layer_bits == {"q": 2}


def test_the_model_behind_a_slice(make_results):
    models = {"2": {"sha256": "two"}, "3": {"sha256": "three"}}
    per_bit_models = make_results(parent={"models": models})
    assert JobResults.from_json(per_bit_models).parent.of(3) == ParentRecord(sha256="three")
    assert JobResults.from_json(make_results()).parent.of(3).sha256 == "ab" * 32


def test_task_scores_of_both_shapes():
    assert task_scores({"a": 0.5, "b": {"acc": 0.7, "name": "x"}}) == {"a": 0.5, "b/acc": 0.7}
    assert task_scores({}) == {}


def test_importing_the_package_stays_light():
    code = "import sys, matquant.report, matquant.report.summary; print([m for m in sys.modules])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'matquant.report.summary'" in modules
    for heavy in ("matplotlib", "wandb", "torch", "PIL"):
        assert f"'{heavy}'" not in modules
