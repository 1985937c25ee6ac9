"""Refinement as a stage of a job: its results, its artifact, and every reader of refined scales."""

import json
from pathlib import Path

import pytest
import torch
from shared import SMALL
from transformers import AutoModelForCausalLM

from matquant.formats.parent import Parent
from matquant.refine.config import RefineConfig
from matquant.stages.load import refine_dtype
from matquant.store.artifact import read_artifact

pytestmark = pytest.mark.slow

REFINE = (
    "refine=scales",
    "refine.steps=8",
    "refine.validate_every=4",
    "refine.text.seed=null",
    "refine.text.sequences=12",
    "refine.text.sequence_length=64",
    "refine.text.batch_size=4",
    "refine.validation_sequences=4",
)


@pytest.fixture
def job(matquant, tmp_path, small_model):
    """Run one job that must succeed; returns its results."""

    def run(*overrides: str) -> dict:
        status, _, err = matquant(*SMALL, f"model.path={small_model}", "method.group_size=32", *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


@pytest.mark.parametrize(
    ("settings", "model", "device", "expected"),
    [
        ({"method": "scales"}, torch.float32, "cuda", torch.bfloat16),
        ({"method": "scales"}, torch.float32, "cpu", torch.float32),
        ({"method": "scales"}, torch.float16, "cuda", torch.float16),
        ({"method": "scales", "dtype": "float32"}, torch.float32, "cuda", torch.float32),
        ({"method": "scales", "dtype": "bfloat16"}, torch.float32, "cpu", torch.bfloat16),
        ({"method": "qat"}, torch.float32, "cuda", torch.float32),
        ({}, torch.float32, "cuda", torch.float32),
    ],
)
def test_dtype_of_the_passes(settings, model, device, expected):
    assert refine_dtype(RefineConfig(**settings), model, torch.device(device)) == expected


@pytest.mark.slow
def test_a_refinement_in_bfloat16_is_another_one_and_gains_as_much(job):
    half, whole = (job(*REFINE, "bits=[2,8]", f"refine.dtype={dtype}") for dtype in ("bfloat16", "auto"))
    assert half["parent"]["sha256"] != whole["parent"]["sha256"]
    assert (half["refine"]["dtype"], whole["refine"]["dtype"]) == ("bfloat16", "float32")
    assert half["slices"][1] == whole["slices"][1]  # 8 bits
    first, last = half["refine"]["history"][0]["kl"]["2"], half["refine"]["history"][-1]["kl"]["2"]
    assert first == pytest.approx(whole["refine"]["history"][0]["kl"]["2"], rel=0.05)
    assert last < first
    assert half["slices"][0]["kl"]["stdlib"] == pytest.approx(whole["slices"][0]["kl"]["stdlib"], rel=0.05)


@pytest.mark.slow
def test_a_refined_parent_is_stored_searched_packed_and_found_again(job, tmp_path):
    plain = job("bits=[2,8]")
    search = ("search.average_bits=3", "search.sequences=4", "search.sequence_length=32", "search.generations=1")
    refined = job(*REFINE, "bits=[2,8]", *search, "pack=nested", "pack.bits=2")
    history = refined["refine"]["history"]
    assert [row["step"] for row in history] == [0, 4, 8]
    assert refined["refine"]["bits"] == [2, 3, 4]
    assert min(row["kl"]["2"] for row in history) < history[0]["kl"]["2"]
    assert refined["parent"]["sha256"] != plain["parent"]["sha256"]
    assert Path(refined["parent"]["path"]).parent.name == "refined"
    assert refined["slices"][1]["kl"] == plain["slices"][1]["kl"]  # 8 bits
    assert refined["slices"][0]["kl"] != plain["slices"][0]["kl"]
    parent = Parent(read_artifact(Path(refined["parent"]["path"])))
    model = AutoModelForCausalLM.from_pretrained(refined["pack"]["folder"], dtype=torch.float32)
    name, weight = next(iter(parent.block(0).items()))
    assert torch.equal(model.get_submodule(name).nested_planes().dequantize(2), weight.dequantize(2))
    again = job(*REFINE, "bits=[3]", "stages=[evaluate]")
    assert again["refine"]["reused"]
    assert again["parent"]["sha256"] == refined["parent"]["sha256"]
    assert (tmp_path / "run" / "report.html").read_text().count("refined in 8 steps") == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=gptq"], "refine=scales trains one parent, but method=gptq makes one model per bit-width"),
        (["refine.text.batch_size=13"], "refine.text.sequences=12 do not fill one batch of refine.text.batch_size=13"),
        (["refine.text.dataset=nothing"], "refine.text.dataset must be one of"),
        (["refine.text.dataset=slef"], "self, mix; found 'slef'"),
        (["refine.text.dataset=self", "refine.top_k=0"], "refine.top_k must be at least 1; found 0"),
        (["refine.text.dataset=self", "refine.text.sequences=0"], "refine.text.sequences must be at least 1; found 0"),
        (
            ["refine.text.dataset=mix", "+refine.text.mix={stdlib:1,self:-1}"],
            "refine.text.mix.self=-1.0: a mix is of stdlib",
        ),
        (
            ["refine.text.dataset=mix", "+refine.text.mix={self:1,nothing:1}"],
            "refine.text.mix.nothing=1.0: a mix is of",
        ),
        (["refine.text.dataset=self", "+refine.text.mix={self:1}"], "goes with refine.text.dataset=mix"),
        (
            ["calibration.dataset=self"],
            "calibration.dataset=self: only a refinement can be trained on text that the model",
        ),
        (["refine.text.sequence_length=100000"], "refine.text.sequence_length=100000 is longer than the context"),
        (["refine.bits=[2,9]"], "refine.bits names 9"),
    ],
)
def test_bad_settings_are_refused_before_any_work(matquant, small_model, tmp_path, overrides, sentence):
    status, _, err = matquant(*SMALL, f"model.path={small_model}", *REFINE, *overrides)
    assert status not in (0, None)
    assert sentence in err
    assert not (tmp_path / "store" / "parent").exists()


def test_a_refinement_is_not_made_without_the_stage_quantize(matquant, small_model):
    status, _, err = matquant(*SMALL, f"model.path={small_model}", *REFINE, "stages=[evaluate]")
    assert status not in (0, None)
    assert "add quantize to stages" in err


OWN_TEXTS = [["refine.text.dataset=self"], ["refine.text.dataset=mix", "+refine.text.mix={stdlib:1,self:2}"]]


@pytest.mark.slow
@pytest.mark.parametrize("text", OWN_TEXTS, ids=["self", "mix"])
def test_a_refinement_on_the_models_own_text_is_found_again(job, matquant, small_model, text):
    settings = (*REFINE, *text, "bits=[2]")
    refined = job(*settings)
    history = refined["refine"]["history"]
    assert min(row["kl"]["2"] for row in history) < history[0]["kl"]["2"]
    again = job(*settings, "stages=[evaluate]")
    assert again["refine"]["reused"]
    assert again["parent"]["sha256"] == refined["parent"]["sha256"]
    status, _, err = matquant(*SMALL, f"model.path={small_model}", *settings, "refine.top_k=3", "stages=[evaluate]")
    assert status not in (0, None)
    assert "no such" in err
