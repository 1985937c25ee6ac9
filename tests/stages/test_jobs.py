"""Whole jobs through the command line: results, sweeps, resuming, and looking after the store."""

import csv
import itertools
import json
import signal
import time
from pathlib import Path

import pytest
from shared import SMALL, TINY

pytestmark = pytest.mark.slow

# Enough text of the shipped model for a width's KL to stand out of the noise.
QUICK = (
    "calibration.sequences=8",
    "calibration.sequence_length=256",
    "eval.datasets.stdlib.sequences=4",
    "eval.datasets.stdlib.sequence_length=256",
    "tracking=none",
)

# A small job whose blocks take long enough to be interrupted; sums do not depend on the number of threads with one.
RESUMED = (*SMALL, "method.group_size=64", "bits=2", "calibration.sequences=16", "runtime.threads=1")


def load(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def divergences(results: dict) -> list[float]:
    return [entry["kl"]["stdlib"] for entry in results["slices"]]


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory) -> Path:
    """First two of the six blocks of the shipped model, whose weights are trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("shallow")
    model = AutoModelForCausalLM.from_pretrained(TINY, num_hidden_layers=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def job(matquant, tmp_path):
    """Run one job that must succeed; returns its results."""

    def run(*overrides: str) -> dict:
        status, _, err = matquant(*overrides)
        assert status == 0, err
        return load(tmp_path / "run")

    return run


def test_the_default_job_on_less_text(matquant, tmp_path):
    status, out, err = matquant(*QUICK)
    assert status == 0, err
    results = load(tmp_path / "run")
    assert [entry["bits"] for entry in results["slices"]] == [2, 3, 4, 6, 8]
    kl = divergences(results)
    assert all(more > less > 0 for more, less in itertools.pairwise(kl))
    full = results["baseline"]["perplexity"]["stdlib"]
    assert results["slices"][-1]["perplexity"]["stdlib"] == pytest.approx(full, rel=0.005)
    assert results["parent"]["reused"] is False
    assert len(results["layers"]) == 42
    assert all(row["error"]["8"] < row["error"]["2"] for row in results["layers"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert "report.html" in out
    assert out.count("next, ") == 3


def test_ours_beats_the_published_algorithm_and_bit_widths_that_the_objective_does_not_name_lie_between(
    job, shallow_model
):
    quick = (*QUICK, f"model.path={shallow_model}", "bits=[2,3,4,5,6,7,8]")
    ours, published = (divergences(job(*quick, f"method={name}")) for name in ("matgptq", "matgptq_v1"))
    assert all(a < b for a, b in zip(ours, published, strict=True))
    assert all(more > less for more, less in itertools.pairwise(ours))


def test_baseline_methods_make_one_model_per_bit_width(job, shallow_model):
    enough = (*QUICK, f"model.path={shallow_model}", "calibration.sequences=32", "bits=[3,4]")
    results = job(*enough, "method=gptq")
    assert results["parent"]["models"].keys() == {"3", "4"}
    rounded = job(*enough, "method=rtn")
    assert all(a < b for a, b in zip(divergences(results), divergences(rounded), strict=True))
    # A model of 3 bits and scales in fp16 for every 128 weights.
    weights = sum(row["parameters"] for row in results["layers"])
    assert results["slices"][0]["bytes"] == weights * 3 / 8 + weights / 128 * 2


def test_round_slices_say_that_they_read_one_bit_more(job, small_model):
    small = (*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=[2,8]")
    msb, rounded = job(*small), job(*small, "method=matgptq_v1")
    weights = sum(row["parameters"] for row in msb["layers"])
    assert rounded["slices"][0]["bytes"] - msb["slices"][0]["bytes"] == weights / 8
    assert rounded["slices"][1]["bytes"] == msb["slices"][1]["bytes"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.group_size=32", "method.act_order=true"],
        ["method.group_size=-1", "method.symmetric=false"],
        ["method=rtn", "method.per_bit_models=false"],
        ["method=gptq", "method.per_bit_models=false", "method.slicing=msb"],
        ["method.slicing=round", "method.zero_point_offset=0", "method.stretch=1", "method.calibration_bits=[4]"],
        ["method.true_sequential=false", "method.asymmetric_calibration=false"],
        ["method.master_bits=6", "++objective.weights={2:1,4:1,6:1}", "method.calibration_bits=[2,6]", "bits=null"],
        ["method.skip=['*.down_proj']"],
        ["method.quantize_lm_head=true"],
    ],
)
def test_options_compose(job, small_model, overrides):
    results = job(*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=[2,6]", *overrides)
    kl = divergences(results)
    assert kl[0] > kl[-1] >= 0
    names = [row["name"] for row in results["layers"]]
    assert any("down_proj" in name for name in names) != ("method.skip=['*.down_proj']" in overrides)
    assert ("lm_head" in names) == ("method.quantize_lm_head=true" in overrides)


def test_calibrating_on_a_text_of_ones_own(job, small_model, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word{i % 97} and number {i}" for i in range(2000)))
    results = job(
        *SMALL,
        f"model.path={small_model}",
        "method.group_size=64",
        "calibration=local",
        f"calibration.path={text}",
        "calibration.sequences=4",
        "calibration.sequence_length=64",
    )
    assert divergences(results)[0] > 0


def test_some_layers_have_options_of_their_own(job, small_model):
    small = (*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=[2,8]", "calibration.batch_size=auto")
    plain = job(*small)
    mixed = job(*small, "++method.overrides={*.down_proj:{group_size:32},*.o_proj:{weights:{2:1}}}")
    sizes = {row["name"]: row["parameters"] for row in plain["layers"]}
    down = sum(size for name, size in sizes.items() if name.endswith("down_proj"))
    assert mixed["slices"][0]["bytes"] - plain["slices"][0]["bytes"] == down / 32 * 2 - down / 64 * 2
    errors = {row["name"]: row["error"] for row in mixed["layers"]}
    own = [error for name, error in errors.items() if name.endswith("o_proj")]
    assert all(error.keys() == {"2"} for error in own)
    assert all(len(error) > 1 for name, error in errors.items() if not name.endswith("o_proj"))


def check_sweep(folder: Path, widths: list[int], out: str) -> None:
    """Assert that one of the jobs of a sweep over bit-widths made the parent of all, and that they are summarized."""
    jobs = [load(folder / str(number)) for number in range(len(widths))]
    assert sorted(job["parent"]["reused"] for job in jobs) == [False] + [True] * (len(widths) - 1)
    assert len({job["parent"]["sha256"] for job in jobs}) == 1
    assert [job["slices"][0]["bits"] for job in jobs] == widths
    with (folder / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(widths)
    assert "summary.html" in out
    assert "next, " not in out


def test_a_sweep_over_bits_quantizes_once(matquant, tmp_path, small_model):
    status, out, err = matquant("-m", "bits=2,3,4,8", f"model.path={small_model}", "method.group_size=64", *SMALL)
    assert status == 0, err
    check_sweep(tmp_path / "sweep", [2, 3, 4, 8], out)


def test_a_sweep_in_several_processes_quantizes_once(run_py, tmp_path, small_model):
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = run_py("-m", "bits=2,3,8", f"model.path={small_model}", "method.group_size=64", *SMALL, *launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    check_sweep(tmp_path / "sweep", [2, 3, 8], out)


def test_a_failed_job_does_not_lose_the_others(run_py, tmp_path, small_model):
    process = run_py("-m", "bits=2,3", "method.group_size=64,96", f"model.path={small_model}", *SMALL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "method.group_size must be one of" in err
    with (tmp_path / "sweep" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert sum(row["status"] == "failed" for row in rows) == 2


def wait_for_block(index: int, store: Path, process) -> None:
    deadline = time.monotonic() + 120
    while not any(store.glob(f"partial/parent-*/block-{index:04d}.safetensors")):
        assert time.monotonic() < deadline, "the block was never written"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


def resumed_and_undisturbed(fork_job, job, overrides, folder: Path) -> tuple[str, str]:
    """Hashes of the parent that the next run resumes, and of one made at once."""
    out, err = fork_job(*overrides).communicate(timeout=300)
    assert "resuming" in out + err
    resumed = load(folder / "run")["parent"]["sha256"]
    undisturbed = job(*overrides, f"store.path={folder}/undisturbed")["parent"]
    assert undisturbed["reused"] is False
    return resumed, undisturbed["sha256"]


def test_killed_three_times_it_ends_with_the_same_bytes(fork_job, job, tmp_path, small_model):
    overrides = (
        *RESUMED,
        f"model.path={small_model}",
        "method.calibration_bits=[2,8]",
        "++objective.weights={2:1,8:100}",
    )
    for block in (0, 1, 2):
        process = fork_job(*overrides)
        wait_for_block(block, tmp_path / "store", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed, undisturbed = resumed_and_undisturbed(fork_job, job, overrides, tmp_path)
    assert resumed == undisturbed


def test_a_stopped_run_says_so_and_resumes_to_the_same_bytes(fork_job, job, tmp_path, small_model):
    overrides = (*RESUMED, f"model.path={small_model}")
    for block, stop in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        process = fork_job(*overrides)
        wait_for_block(block, tmp_path / "store", process)  # the one before it then stands in the journal
        process.send_signal(stop)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "finished blocks are kept" in err
        assert "Traceback" not in err
    resumed, undisturbed = resumed_and_undisturbed(fork_job, job, overrides, tmp_path)
    assert resumed == undisturbed


def test_weights_loaded_in_another_dtype_are_another_parent(job, small_model):
    small = (*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=2")
    stored, wide = job(*small)["parent"], job(*small, "model.dtype=float32")["parent"]
    assert wide["reused"] is False
    assert wide["path"] != stored["path"]


def test_a_tracking_failure_stands_in_the_results(job, small_model, monkeypatch):
    monkeypatch.setattr("matquant.report.track", lambda *_: "wandb could not be reached.")
    small = (*SMALL, f"model.path={small_model}", "method=rtn", "method.group_size=64", "bits=4", "tracking=wandb")
    assert "wandb could not be reached." in job(*small)["warnings"]


def test_a_flipped_byte_is_named_and_mended(job, tmp_path, small_model):
    small = (*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=2")
    first = job(*small)["parent"]
    block = Path(first["path"]) / "block-0002.safetensors"
    data = bytearray(block.read_bytes())
    data[-7] ^= 1
    block.write_bytes(data)
    again = job(*small)
    assert again["parent"]["reused"] is False
    assert again["parent"]["sha256"] == first["sha256"]
    assert any("block-0002.safetensors" in warning for warning in again["warnings"])


def test_looking_after_the_store(matquant, job, small_model):
    parent = job(*SMALL, f"model.path={small_model}", "method.group_size=64", "bits=2")["parent"]
    status, out, _ = matquant("store=ls")
    assert status == 0
    assert Path(parent["path"]).name in out
    assert matquant("store=verify")[0] == 0
    block = Path(parent["path"]) / "block-0000.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    status, out, err = matquant("store=verify")
    assert status == 2
    assert "block-0000.safetensors" in out
    assert "1 damaged" in err
    assert matquant("store=clean")[0] == 0
    assert not block.exists()
