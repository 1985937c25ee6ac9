"""Searches through the command line: what they write, that it can be read again, and what they refuse."""

import json
import sys

import pytest
import yaml
from shared import SMALL

from matquant import cli

# Rounded to nearest, as the parent's quality is not what is looked at.
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
    "search.widths=[2,3,4,8]",
    "bits=[2,3]",
)


@pytest.fixture(scope="module")
def first(tmp_path_factory, small_model):
    """One search for the whole module: its folder, which holds its store and its run."""
    folder = tmp_path_factory.mktemp("search")
    where = (f"store.path={folder}/store", f"hydra.run.dir={folder}/run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", f"model.path={small_model}", *QUICK, "search.average_bits=2.6", *where])
        cli.main()
    return folder


@pytest.fixture
def job(matquant, tmp_path, small_model, first):
    """Run a job that must succeed, with the parent that is there; its results."""

    def run(*overrides):
        status, _, err = matquant(f"model.path={small_model}", *QUICK, f"store.path={first}/store", *overrides)
        assert status == 0, err
        return load(tmp_path)

    return run


def load(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def found(results):
    return [entry for entry in results["slices"] if entry["bits"] == "allocation"]


def test_a_budget_alone_asks_for_the_default_search_and_its_files_measure_the_same(first, job, tmp_path):
    results = load(first)
    assert results["search"]["method"] == "hybrid"
    assert results["search"]["evaluations_per_second"] > 0
    assert results["search"]["served"] == "decoded"
    (entry,) = found(results)
    assert entry["average_bits"] <= 2.6
    path = first / "run" / "allocation.yaml"
    written = yaml.safe_load(path.read_text())
    sizes = {row["name"]: row["parameters"] for row in results["layers"]}
    average = sum(sizes[n] * bits for n, bits in written["bits"].items()) / sum(sizes.values())
    assert entry["average_bits"] == written["average_bits"] == pytest.approx(average)
    assert written["measured"] > 0
    assert written["predicted"] > 0
    # The files that it wrote, in both formats, are the same model; one that was edited is another, and says so.
    edited = tmp_path / "edited.yaml"
    edited.write_text(path.read_text().replace("_proj: 2", "_proj: 8", 1))
    again = job(f"bits=[{path},{path.with_suffix('.txt')},{edited}]")
    *same, other = found(again)
    assert [e["kl"] for e in same] == [entry["kl"]] * 2
    assert [e["bytes"] for e in same] == [entry["bytes"]] * 2
    assert other["bytes"] > entry["bytes"]
    assert [warning for warning in again["warnings"] if "it was edited" in warning] != []
    assert not any(str(path) in warning for warning in again["warnings"])


def test_the_same_search_is_found_in_the_store(first, job):
    again = job("search.average_bits=2.6", "search.cache_gigabytes=0")
    assert (load(first)["search"]["reused"], again["search"]["reused"]) == (False, True)
    assert found(again) == found(load(first))
    other = job("search.average_bits=2.6", "search.seed=1", "search.serve=planes")
    assert other["search"]["reused"] is False
    assert other["search"]["served"] == "planes"


def test_a_byte_budget_counts_scales_and_is_never_exceeded(first, job):
    full = {entry["bits"]: entry["bytes"] for entry in load(first)["slices"]}
    budget = (full[2] + full[3]) // 2
    (entry,) = found(job(f"search.gigabytes={budget / 1e9:.9f}", "search=sensitivity"))
    assert full[2] < entry["bytes"] <= budget
    (entry,) = found(
        job(
            f"search.gigabytes={full[3] / 1e9:.9f}",
            "search=evolve",
            "search.initial_tokens=32",
            "search.survivors=[2,1]",
            "search.tokens=[32,64]",
            "search.generations=1",
        )
    )
    assert entry["bytes"] <= full[3]


def test_a_ladder_is_monotone_and_its_allocations_are_files(job, tmp_path):
    results = job("search=pareto", "search.ladder=[4,2.5,3,8]", "search.generations=1", "search.tokens=[32,64]")
    rows = results["search"]["front"]
    assert [row["budget"] for row in rows] == ["2.5 bits", "3 bits", "4 bits", "8 bits"]
    losses = [row["measured"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert [entry["average_bits"] for entry in found(results)] == [row["average_bits"] for row in rows]
    assert all((tmp_path / "run" / row["file"]).is_file() for row in rows)


def test_fused_layers_get_one_width(job):
    (entry,) = found(job("search.average_bits=3.1", "search.fused=true", "search=sensitivity"))
    widths = entry["allocation"]["widths"]
    for block in range(4):
        attention = {widths[f"model.layers.{block}.self_attn.{p}_proj"] for p in "qkv"}
        assert len(attention) == 1
        assert widths[f"model.layers.{block}.mlp.gate_proj"] == widths[f"model.layers.{block}.mlp.up_proj"]


def test_a_killed_search_goes_on_and_finds_the_same(first, matquant, small_model, monkeypatch, tmp_path):
    from matquant.search import evolution

    measured = evolution._generation
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(evolution, "_generation", dies)
    same = (f"model.path={small_model}", *QUICK, "search.average_bits=2.6")  # in a store of its own
    assert matquant(*same)[0] == 130
    assert matquant(*same)[0] == 0
    assert len(calls) == 4
    assert found(load(tmp_path)) == found(load(first))
    assert load(tmp_path)["search"]["history"] == load(first)["search"]["history"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["search=evolve"], "needs one budget"),
        (["search.average_bits=3", "search.gigabytes=1"], "needs one budget"),
        (["search.average_bits=1.5"], "A budget of 1.5 bits cannot be kept"),
        (["search.gigabytes=1e-6"], "the narrowest width, 2 bits in every layer, needs"),
        (["search.average_bits=3", "search.widths=[2,9]"], "search.widths: a width must lie in 2..8; found 9"),
        (["search.average_bits=3", "search.survivors=[4,2]"], "the last survivor alone"),
        (["search.average_bits=3", "search.tokens=[64]"], "describe the same stages"),
        (["search.average_bits=3", "search.survivors=[1,2,1]", "search.tokens=[2,2,2]"], "cannot grow"),
        (["search.average_bits=3", "method.per_bit_models=true"], "makes a model for each width"),
        (["search.average_bits=3", "search.fitness=speed"], "search.fitness must be one of kl, sparse_kl, perplexity"),
        (["search.average_bits=3", "search.sequence_length=4000"], "search.sequence_length=4000 is longer"),
        (["search.average_bits=3", "search.sensitivity=error"], "no second-order error is recorded"),
        (["bits=nowhere.yaml"], "There is no allocation at nowhere.yaml"),
        (["bits=nowhere.yaml", "method.per_bit_models=true"], "mixes widths of one parent"),
    ],
)
def test_what_is_refused(matquant, small_model, overrides, sentence):
    status, _, err = matquant(f"model.path={small_model}", *QUICK, *overrides)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
