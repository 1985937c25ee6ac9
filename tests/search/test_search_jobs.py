"""Searches through the command line: written files, resumption, and refusals."""

import json
import sys

import pytest
import yaml
from shared import SMALL

from matquant import cli
from matquant.store.draft import Draft

pytestmark = pytest.mark.slow

# Rounded to nearest: these tests do not depend on the quality of the parent.
QUICK = (
    *SMALL,
    "method=rtn",
    "method.per_bit_models=false",
    "method.group_size=64",
    "search.sequences=4",
    "search.sequence_length=32",
    "search.sensitivity_tokens=32",
    "search.tokens=[32,64]",
    "search.generations=3",
    "search.offspring=4",
    "search.survivors=[2,1]",
    "search.bits=[2,3,4,8]",
    "bits=[2,3]",
)


@pytest.fixture(scope="module")
def first(tmp_path_factory, small_model):
    """Folder of one search, with its store and its run, shared by the module."""
    folder = tmp_path_factory.mktemp("search")
    paths = (f"store.path={folder}/store", f"hydra.run.dir={folder}/run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", f"model.path={small_model}", *QUICK, "search.average_bits=2.6", *paths])
        cli.main()
    return folder


@pytest.fixture
def job(matquant, tmp_path, small_model, first):
    """Run a job that must succeed, on the parent of ``first``; return its results."""

    def run(*overrides):
        status, _, err = matquant(f"model.path={small_model}", *QUICK, f"store.path={first}/store", *overrides)
        assert status == 0, err
        return load_results(tmp_path)

    return run


def load_results(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def allocation_slices(results):
    return [entry for entry in results["slices"] if entry["bits"] == "allocation"]


@pytest.mark.slow
def test_budget_alone_runs_the_default_search(first):
    results = load_results(first)
    assert results["search"]["method"] == "hybrid"
    assert results["search"]["evaluations_per_second"] > 0
    assert results["search"]["served"] == "dense"
    assert results["search"]["bits"] == [2, 3, 4, 8]
    (entry,) = allocation_slices(results)
    assert entry["average_bits"] <= 2.6
    written = yaml.safe_load((first / "run" / "allocation.yaml").read_text())
    sizes = {row["name"]: row["parameters"] for row in results["layers"]}
    average = sum(sizes[name] * bits for name, bits in written["bits"].items()) / sum(sizes.values())
    assert entry["average_bits"] == written["average_bits"] == pytest.approx(average)
    assert written["measured"] > 0
    assert written["predicted"] > 0


@pytest.mark.slow
def test_written_allocations_evaluate_to_the_same_figures(first, job, tmp_path):
    (entry,) = allocation_slices(load_results(first))
    path = first / "run" / "allocation.yaml"
    edited = tmp_path / "edited.yaml"
    edited.write_text(path.read_text().replace("_proj: 2", "_proj: 8", 1))
    again = job(f"bits=[{path},{path.with_suffix('.txt')},{edited}]")
    *same, other = allocation_slices(again)
    assert [e["kl"] for e in same] == [entry["kl"]] * 2
    assert [e["bytes"] for e in same] == [entry["bytes"]] * 2
    assert other["bytes"] > entry["bytes"]
    warnings = [warning for warning in again["warnings"] if "edited" in warning]
    assert len(warnings) == 1
    assert str(edited) in warnings[0]


@pytest.mark.slow
def test_same_search_is_reused_from_the_store(first, job):
    again = job("search.average_bits=2.6", "search.cache_gb=0")  # no part of the key
    assert (load_results(first)["search"]["reused"], again["search"]["reused"]) == (False, True)
    assert allocation_slices(again) == allocation_slices(load_results(first))
    other = job("search.average_bits=2.6", "search.seed=1", "search.layer_forward=planes")
    assert other["search"]["reused"] is False
    assert other["search"]["served"] == "planes"


@pytest.mark.slow
def test_byte_budget_includes_scales_and_is_kept(first, job):
    full = {entry["bits"]: entry["bytes"] for entry in load_results(first)["slices"]}
    budget = (full[2] + full[3]) // 2
    (entry,) = allocation_slices(job(f"search.budget_gb={budget / 1e9:.9f}", "search=sensitivity"))
    assert full[2] < entry["bytes"] <= budget
    (entry,) = allocation_slices(
        job(
            f"search.budget_gb={full[3] / 1e9:.9f}",
            "search=evolve",
            "search.initial_tokens=32",
            "search.survivors=[2,1]",
            "search.tokens=[32,64]",
            "search.generations=1",
        )
    )
    assert entry["bytes"] <= full[3]


@pytest.mark.slow
def test_several_budgets_give_one_file_each_and_falling_losses(job, tmp_path):
    results = job("search=pareto", "search.budgets=[4,2.5,3,8]", "search.generations=1", "search.tokens=[32,64]")
    rows = results["search"]["front"]
    assert [row["budget"] for row in rows] == ["2.5 bits", "3 bits", "4 bits", "8 bits"]
    losses = [row["measured"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    entries = allocation_slices(results)
    assert [entry["average_bits"] for entry in entries] == [row["average_bits"] for row in rows]
    assert all((tmp_path / "run" / row["file"]).is_file() for row in rows)


@pytest.mark.slow
def test_layers_with_the_same_input_share_a_bit_width(job):
    (entry,) = allocation_slices(job("search.average_bits=3.1", "search.fuse_shared_inputs=true", "search=sensitivity"))
    bits = entry["allocation"]["bits"]
    for block in range(4):
        attention = {bits[f"model.layers.{block}.self_attn.{p}_proj"] for p in "qkv"}
        assert len(attention) == 1
        assert bits[f"model.layers.{block}.mlp.gate_proj"] == bits[f"model.layers.{block}.mlp.up_proj"]


@pytest.mark.slow
def test_killed_search_resumes_after_the_last_generation(first, matquant, small_model, monkeypatch, tmp_path):
    write, generations = Draft.write_json, []

    def write_and_stop_once(draft, name, value):
        write(draft, name, value)
        if "generation" in name:
            generations.append(name)
            if len(generations) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Draft, "write_json", write_and_stop_once)
    same = (f"model.path={small_model}", *QUICK, "search.average_bits=2.6")  # in a store of its own
    assert matquant(*same)[0] == 130
    assert matquant(*same)[0] == 0
    assert generations == [f"budget-00-generation-000{number}.json" for number in (1, 2, 3)]
    assert allocation_slices(load_results(tmp_path)) == allocation_slices(load_results(first))
    assert load_results(tmp_path)["search"]["history"] == load_results(first)["search"]["history"]


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["search=evolve"], ["exactly one budget", "search.average_bits"]),
        (["search.average_bits=3", "search.budget_gb=1"], ["exactly one budget"]),
        (["search.average_bits=1.5"], ["1.5 bits is too small"]),
        (["search.budget_gb=1e-6"], ["2 bits in every layer, needs", "search.bits"]),
        (["search.average_bits=3", "search.bits=[2,9]"], ["search.bits", "2..8", "found 9"]),
        (["search.average_bits=3", "search.fitness=speed"], ["search.fitness", "kl, sparse_kl, perplexity", "speed"]),
        (["search.average_bits=3", "search.layer_forward=fast"], ["search.layer_forward", "auto, dense, planes"]),
        (["search.average_bits=3", "method.per_bit_models=true"], ["one model per bit-width"]),
        (["search.average_bits=3", "search.sequence_length=4000"], ["search.sequence_length=4000", "longer"]),
        (["search.average_bits=3", "search.sensitivity=error"], ["search.sensitivity=error", "no second-order error"]),
        (["search.gigabytes=1"], ["search.gigabytes", "search.budget_gb"]),
        (["bits=nowhere.yaml"], ["nowhere.yaml"]),
        (["bits=nowhere.yaml", "method.per_bit_models=true"], ["nowhere.yaml", "method.per_bit_models=false"]),
    ],
)
def test_refusals_name_the_setting(matquant, small_model, overrides, facts):
    status, _, err = matquant(f"model.path={small_model}", *QUICK, *overrides)
    assert status == 2
    for fact in facts:
        assert fact in err
    assert "Traceback" not in err
