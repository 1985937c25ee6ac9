"""MatQuant as published, as whole jobs: presets, objective, store, search, packed slices, refusals."""

import json
from pathlib import Path

import pytest
import torch
from shared import SMALL
from transformers import AutoModelForCausalLM

from matquant.formats.parent import Parent
from matquant.store.artifact import read_artifact

pytestmark = pytest.mark.slow

OMNIQUANT = ("method=matquant_omniquant", "method.epochs=2")
QAT = (
    "method=matquant_qat",
    "refine.steps=4",
    "refine.validate_every=2",
    "refine.warmup_steps=1",
    "refine.learning_rate=1e-3",
    "refine.text.seed=null",
    "refine.text.sequences=16",
    "refine.text.sequence_length=32",
    "refine.text.batch_size=4",
    "refine.validation_sequences=4",
)


@pytest.fixture
def job(matquant, tmp_path, small_model):
    """Run one job that must succeed; returns its results."""

    def run(*overrides: str) -> dict:
        status, _, err = matquant(*SMALL, f"model.path={small_model}", *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [(OMNIQUANT, "parent"), (QAT, "refined")], ids=["omniquant", "qat"])
def test_a_published_method_is_stored_searched_packed_and_found_again(method, kind, job, tmp_path):
    search = ("search.average_bits=3", "search.sequences=4", "search.sequence_length=32", "search.generations=1")
    results = job(*method, *search, "pack=nested", "pack.bits=2")
    assert [one["bits"] for one in results["slices"][:5]] == [2, 3, 4, 6, 8]
    kl = [one["kl"]["stdlib"] for one in results["slices"][:5]]
    assert kl[0] > kl[2] > kl[4] > 0
    folder = Path(results["parent"]["path"])
    assert folder.parent.name == kind
    parent = Parent(read_artifact(folder))
    names = {name for index in range(len(parent.blocks)) for name in parent.block(index)}
    assert len(names) == 4 * 3
    assert all(".mlp." in name for name in names)
    model = AutoModelForCausalLM.from_pretrained(results["pack"]["folder"], dtype=torch.float32)
    for name, weight in parent.block(0).items():
        assert weight.codes.shape[1] == weight.format.group_size  # a scale for each row
        assert torch.equal(model.get_submodule(name).nested_planes().dequantize(2), weight.dequantize(2))
    again = job(*method, "bits=[3]", "stages=[evaluate]")
    assert again["parent"]["sha256"] == results["parent"]["sha256"]
    assert again["parent"]["reused"]


@pytest.mark.slow
def test_batches_of_another_size_make_another_parent(job):
    fast = (*OMNIQUANT, "method.learning_rate=0.5", "stages=[quantize]")
    parents = [job(*fast, f"calibration.batch_size={size}")["parent"] for size in (2, 4, 2)]
    assert [one["reused"] for one in parents] == [False, False, True]
    assert parents[0]["sha256"] == parents[2]["sha256"] != parents[1]["sha256"]


@pytest.mark.slow
def test_training_of_the_weights_is_reported(job, tmp_path):
    results = job(*QAT)
    assert results["refine"]["method"] == "qat"
    assert [row["step"] for row in results["refine"]["history"]] == [0, 2, 4]
    assert (tmp_path / "run" / "report.html").read_text().count("Weights trained at 2, 4, 8 bits in 4 steps") == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=matquant_qat", "quality=fast"], "is round to nearest until refine=qat trains it"),
        (["method=matquant_qat", "refine=scales"], "is round to nearest until refine=qat trains it"),
        (["refine=qat"], "nothing of method=matgptq would be left. Use method=matquant_qat"),
        (["method=rtn", "refine=qat"], "nothing of method=rtn would be left"),
        (["method=matquant_qat", "refine.bits=[2,3]"], "names 3, which has no weight in the objective"),
        (["method=matquant_qat", "method.per_bit_models=true"], "makes one model per bit-width"),
        (["method=matquant_qat", "refine.distilled_bits=[8]"], "only those below 8"),
        (["method=matquant_omniquant", "method.distilled_bits=[3]"], "names 3, which has no weight in the objective"),
        (["method=matquant_omniquant", "method.slicing=msb"], "trains round slices"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(matquant, small_model, tmp_path, overrides, sentence):
    status, _, err = matquant(*SMALL, f"model.path={small_model}", *overrides)
    assert status not in (0, None)
    assert sentence in err
    assert not (tmp_path / "store" / "parent").exists()
