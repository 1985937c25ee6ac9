"""A gradient-based method in one Python file and one YAML file passes through driver, store, evaluation and packing."""

import json
import re
from pathlib import Path

import pytest
import torch
from shared import SMALL
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TOY = Path(__file__).resolve().parents[1] / "toy"


@pytest.fixture
def toy(matquant, small_model, monkeypatch):
    """Run a job with the toy method; returns exit status, standard output and standard error."""
    monkeypatch.syspath_prepend(str(TOY))

    def run(*overrides: str):
        searched = f"hydra.searchpath=[file://{TOY / 'conf'}]"
        return matquant(searched, *SMALL, f"model.path={small_model}", "method=learned_scales", *overrides)

    return run


def test_scales_trained_with_autograd_pass_through_all_stages(toy, tmp_path):
    status, _, err = toy("bits=[4,8]", "pack=nested", f"pack.path={tmp_path}/packed")
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    notes = [re.search(r"loss (\S+) -> (\S+)", warning) for warning in results["warnings"]]
    losses = [(float(found[1]), float(found[2])) for found in notes if found]
    assert len(losses) == 4  # a line per block
    assert all(last < first for first, last in losses)
    kl = [entry["kl"]["stdlib"] for entry in results["slices"]]
    assert kl[0] > kl[1] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_its_parent_is_found_again_and_a_setting_makes_another(toy, tmp_path):
    def parent(*overrides: str):
        status, _, err = toy("bits=8", "stages=[quantize]", *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())["parent"]

    first, again, longer = parent(), parent(), parent("method.steps=1")
    assert again["reused"] is True
    assert again["sha256"] == first["sha256"] != longer["sha256"]


def test_a_target_that_is_no_method_is_refused(toy):
    status, _, err = toy("method._target_=pathlib.Path")
    assert status == 2
    assert "method._target_=pathlib.Path is no MethodConfig" in err
