"""Everything a user can get wrong ends with a sentence and status 2, before any work."""

import shutil

import pytest
import torch
from shared import SMALL, TINY

pytestmark = pytest.mark.slow


def model_copy(folder, source=TINY):
    return shutil.copytree(source, folder / "model")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["bits=9"], "bits: a bit-width must lie in 2..8; found 9"),
        (["bits=[2,1]"], "bits: a bit-width must lie in 2..8; found 1"),
        (["bits=[4,4]"], "names a bit-width twice"),
        (["bits=four"], "bits must be a whole number; found 'four'"),
        (["objective.weights.4=-1"], "objective.weights.4 must be a number that is not negative; found -1"),
        (["objective.per_bit_factor=0"], "objective.per_bit_factor must lie in 0.01..100, 1 for none; found 0"),
        (["+objective.weights.11=1"], "objective.weights: a bit-width must lie in 2..8; found 11"),
        (["+objective.weights.two=1"], "objective.weights must be a whole number; found 'two'"),
        (["++objective.weights={2:0,3:0,4:0,6:0,8:0}"], "all zero"),
        (["method.group_size=96"], "method.group_size must be one of 32, 64, 128, -1"),
        (["method.block_size=0"], "method.block_size must be at least 1 column; found 0"),
        (["method.master_bits=4"], "are more than the parent's method.master_bits=4"),
        (["method.slicing=top"], "method.slicing must be one of msb, round; found 'top'"),
        (["method.slicing=round"], "method.zero_point_offset is for msb slices"),
        (["method.calibration_bits=[9]"], "method.calibration_bits: a bit-width must lie in 2..8; found 9"),
        (["method.error_feedback=mean"], "method.error_feedback=mean keeps one target for all bit-widths"),
        (["method.damp=0"], "method.damp is a fraction"),
        (["method.staged=false"], "method.staged is called method.true_sequential now"),
        (["+method.streams=[2]"], "method.streams is called method.calibration_bits now"),
        (["objective.tilt=2"], "objective.tilt is called objective.per_bit_factor now"),
        (["method=gpttq"], "matgptq_v1"),
        (["objective=best"], "balanced"),
        (["method.grup_size=64"], "grup_size"),
        (["+method.grup_size=64"], "Unknown setting: method.grup_size"),
        (["stages=[quantise]"], "there is no stage 'quantise'"),
        (["metric=speed"], "metric must be one of kl, perplexity"),
        (["model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["model.name=a/b"], "Set either model.name"),
        (["runtime.device=cuda:99"], "CUDA devices"),
        (["runtime.device=abacus"], "is no device"),
        (["calibration=local"], "needs calibration.path"),
        (["calibration=local", "calibration.path=/nowhere"], "/nowhere"),
        (["calibration=mix", "calibration.mix={c4:0}"], "calibration.mix.c4=0"),
        (["+calibration.mix={c4:1}"], "goes with calibration.dataset=mix"),
        (["++method.overrides={*.o_proj:{group_size:96}}"], "method.overrides.*.o_proj.group_size must be one of"),
        (["calibration.sequences=100000"], "100000"),
        (
            ["eval.datasets.stdlib.sequence_length=1"],
            "eval.datasets.stdlib.sequence_length must be at least 2; found 1",
        ),
        (
            ["calibration.sequence_length=513"],
            "calibration.sequence_length=513 is longer than the context of 512 tokens",
        ),
        (["stages=[evaluate]"], "add quantize to stages"),
        (["store.path=/dev/null"], "is not a folder"),
    ],
)
def test_sentence_and_status(matquant, overrides, sentence):
    status, _, err = matquant(*SMALL, *overrides)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err


def test_a_folder_of_pickles(matquant, tmp_path):
    folder = model_copy(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    status, _, err = matquant(*SMALL, f"model.path={folder}")
    assert status == 2
    assert "pickles only" in err
    assert "save_pretrained" in err


def test_a_damaged_shard(matquant, tmp_path):
    folder = model_copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    status, _, err = matquant(*SMALL, f"model.path={folder}")
    assert status == 2
    assert "model.safetensors" in err


def test_weights_that_are_not_finite_are_named(matquant, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model_copy(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    status, _, err = matquant(*SMALL, f"model.path={folder}", "method=rtn", "bits=4")
    assert status == 2
    assert "model.layers.1.mlp.up_proj.weight hold NaN or Inf" in err


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(run_py, tmp_path):
    process = run_py(*SMALL, "model=llama3_8b", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "meta-llama/Llama-3.1-8B" in err
    assert "model.path" in err
    assert "Traceback" not in err
