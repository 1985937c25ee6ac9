"""Warnings on implausible figures: before quantizing on the terminal, then in table, report, results and model card."""

import json
from pathlib import Path

import pytest
from shared import SMALL

pytestmark = pytest.mark.slow


def test_a_parent_without_good_high_bits_is_a_warning_everywhere(matquant, tmp_path: Path) -> None:
    lopsided = ("++objective.weights={2:1}", "bits=[2,4,8]", "method.calibration_bits=[2]")
    status, out, err = matquant(*SMALL, *lopsided, "pack=nested")
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (large,) = [warning for warning in results["warnings"] if "The slice of 8 bits has a KL of" in warning]
    for text in (
        out,
        (tmp_path / "run" / "report.html").read_text(),
        (tmp_path / "run" / "packed" / "README.md").read_text(),
    ):
        assert large[:60] in " ".join(text.split())


def test_a_model_that_does_not_predict_its_texts_is_a_warning_before_quantizing(
    matquant, small_model: Path, tmp_path: Path
) -> None:
    job = (*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=4", "stages=[quantize]")
    status, out, err = matquant(*job)
    assert status == 0, err
    assert out.index("on a window of calibration: it does not predict this text") < out.index("plan:")
    warnings = json.loads((tmp_path / "run" / "results.json").read_text())["warnings"]
    assert sum("it does not predict this text" in warning for warning in warnings) == 1
