"""Models and machines that misbehave: what is harmless gives a result, what is not is named and stops the job."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import ROOT, SMALL
from torch import Tensor

from matquant import machine

pytestmark = pytest.mark.slow

JOB = (*SMALL, "method.group_size=64", "bits=[2,8]")


@pytest.fixture
def changed(small_model: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of the small model with some tensors changed; returns the override that names it."""

    def make(change: Callable[[dict[str, Tensor]], None], dtype: torch.dtype = torch.float16) -> str:
        folder = shutil.copytree(small_model, tmp_path / "changed")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return f"model.path={folder}"

    return make


def test_dead_input_channels_are_harmless(matquant, changed, tmp_path):
    def kill(tensors):
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[5:9] = 0

    status, _, err = matquant(*JOB, changed(kill))
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < results["slices"][1]["kl"]["stdlib"] < results["slices"][0]["kl"]["stdlib"]


def test_an_outlier_channel_beyond_half_precision_is_harmless(matquant, changed, tmp_path):
    """ActivationCache of 1e6 overflow float16, and their squares span 12 orders of magnitude in a Hessian."""

    def enlarge(tensors):
        tensors["model.layers.1.input_layernorm.weight"][3] = 1e6

    status, _, err = matquant(*JOB, changed(enlarge, torch.float32))
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(0 <= slice_["kl"]["stdlib"] < 10 for slice_ in results["slices"])


def test_weights_whose_scales_cannot_be_stored_are_named(matquant, changed):
    def enlarge(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3] = 1e9

    status, _, err = matquant(*JOB, changed(enlarge, torch.float32))
    assert status == 2
    assert "model.layers.2.mlp.up_proj" in err
    assert "float16" in err


@pytest.mark.parametrize("method", ["matgptq", "rtn"])
@pytest.mark.parametrize(
    "tensor", ["model.layers.1.post_attention_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_named_before_any_work(matquant, changed, method, tensor, value, tmp_path):
    def spoil(tensors):
        tensors[tensor].view(-1)[-1] = value

    status, _, err = matquant(*JOB, f"method={method}", changed(spoil))
    assert status == 2
    assert f"The weights {tensor} hold NaN or Inf" in err
    assert not (tmp_path / "store" / "parent").exists()


@pytest.mark.parametrize("method", ["matgptq", "rtn"])
def test_activations_that_overflow_are_named_before_any_work(matquant, changed, method, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)

    status, _, err = matquant(*JOB, f"method={method}", changed(spoil, torch.float32))
    assert status == 2
    assert "The outputs of model.layers.1 hold NaN or Inf in float32, although all weights are finite" in err
    assert not (tmp_path / "store" / "parent").exists()


@pytest.mark.parametrize("method", ["matgptq", "rtn"])
def test_activations_that_overflow_on_the_texts_are_named_before_any_work(matquant, changed, method, tmp_path):
    def spoil(tensors):  # the few tokens that are tried first give zeros, every other token overflows
        tensors["model.embed_tokens.weight"][:40] = 0
        tensors["model.layers.0.input_layernorm.weight"].fill_(1e25)

    status, _, err = matquant(*JOB, f"method={method}", changed(spoil, torch.float32))
    assert status == 2
    assert "The outputs of model.layers.0 hold NaN or Inf in float32, although all weights are finite" in err
    assert not (tmp_path / "store" / "parent").exists()


def test_a_disk_that_fills_up_stops_the_run_and_it_resumes_to_the_same_bytes(matquant, small_model, tmp_path):
    """The store is on a file system with room for two blocks, which grows before the second run."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a user mount a file system of its own")
    job = (*JOB, f"model.path={small_model}", "runtime.threads=1", "runtime.check_memory=false", "stages=[quantize]")
    command = [sys.executable, str(ROOT / "run.py"), *job, f"hydra.run.dir={tmp_path}/small_run"]
    script = """
        store=$1; folder=$2; shift 2
        mkdir $store && mount -t tmpfs -o size=120k tmpfs $store || exit 1
        "$@" store.path=$store 2> $folder/full.txt; echo $? > $folder/status
        mount -o remount,size=20m $store
        "$@" store.path=$store > $folder/again.txt 2>&1 || exit 1
        cp $store/parent/*/manifest.json $folder/resumed.json
    """
    places = [str(tmp_path / "small"), str(tmp_path)]
    subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *places, *command], check=True, timeout=300)
    assert (tmp_path / "status").read_text().strip() == "2"
    assert "is full" in (tmp_path / "full.txt").read_text()
    assert "Traceback" not in (tmp_path / "full.txt").read_text()
    assert "resuming" in (tmp_path / "again.txt").read_text()
    threads = torch.get_num_threads()
    status, _, err = matquant(*job)
    machine.use_threads(threads)
    assert status == 0, err
    undisturbed = json.loads((tmp_path / "run" / "results.json").read_text())["parent"]["sha256"]
    assert json.loads((tmp_path / "resumed.json").read_text())["sha256"] == undisturbed
