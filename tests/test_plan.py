"""The plan before the work: its sums, its sentence, what it refuses, and whether it was right."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from shared import SMALL

from matquant import machine, plan
from matquant.errors import UserError
from matquant.models.model_sizes import Layer, ModelSizes
from matquant.plan import Calibrating

CPU = torch.device("cpu")
GB = 10**9


def shapes(blocks: int = 4, hidden: int = 1024, inner: int = 4096) -> ModelSizes:
    sizes = (
        [(hidden, hidden, 0, 0)] * 3 + [(hidden, hidden, 1, 1)] + [(inner, hidden, 2, 2)] * 2 + [(hidden, inner, 3, 3)]
    )
    layers = [Layer(rows=r, columns=c, input=i, stage=s) for r, c, i, s in sizes]
    block = sum(layer.rows * layer.columns for layer in layers)
    return ModelSizes(
        layers=layers,
        blocks=blocks,
        parameters=blocks * block + 2 * 1000 * hidden,
        block=block,
        quantized=blocks * block,
        embeddings=1000 * hidden,
        head=1000 * hidden,
        hidden=hidden,
        vocabulary=1000,
        stored=2,
        computing=4,
    )


JOB = Calibrating(tokens=4096, batch=512, streams=4, widths=5, asymmetric=True, staged=True, group_size=128)


def test_memory_does_not_grow_with_depth_and_the_disk_does() -> None:
    needs = [plan.quantizing(shapes(blocks), JOB, on_gpu=False, solver_on_gpu=False, place=CPU) for blocks in (2, 32)]
    assert needs[0].host == needs[1].host
    assert needs[1].disk == 16 * needs[0].disk
    measured = [plan.measuring(shapes(blocks), 4096, 512, 8, 5, on_gpu=False, place=CPU) for blocks in (2, 32)]
    assert measured[0] == measured[1]


def test_hidden_states_count_where_they_wait() -> None:
    waiting = 5 * 4096 * 1024 * 4
    in_memory = plan.quantizing(shapes(), JOB, on_gpu=False, solver_on_gpu=False, place=CPU)
    in_a_file = plan.quantizing(shapes(), JOB, on_gpu=False, solver_on_gpu=False, place=Path("scratch"))
    assert in_memory.host - in_a_file.host == waiting == in_a_file.disk - in_memory.disk
    gpu = torch.device("cuda")
    there, beside = (
        plan.quantizing(shapes(), JOB, on_gpu=True, solver_on_gpu=True, place=place) for place in (gpu, CPU)
    )
    assert there.device - beside.device == waiting == beside.host - there.host


@pytest.mark.parametrize(
    "change", [{"streams": 1}, {"asymmetric": False}, {"widths": 2}, {"tokens": 1024}, {"streams": 0, "tokens": 0}]
)
def test_what_the_sentence_advises_helps(change: dict) -> None:
    less = plan.quantizing(shapes(), dataclasses.replace(JOB, **change), on_gpu=False, solver_on_gpu=False, place=CPU)
    assert less.host < plan.quantizing(shapes(), JOB, on_gpu=False, solver_on_gpu=False, place=CPU).host


def test_the_hessians_of_the_widest_input_are_in_it() -> None:
    square = 4096**2 * 4
    assert (
        plan.quantizing(shapes(), JOB, on_gpu=False, solver_on_gpu=False, place=CPU).host
        > 4 * 2 * square + 5 * 3 * square
    )


def test_the_solver_counts_where_it_runs() -> None:
    with_solver, without = (
        plan.quantizing(shapes(), JOB, on_gpu=True, solver_on_gpu=on_gpu, place=CPU) for on_gpu in (True, False)
    )
    assert with_solver.device > without.device
    assert with_solver.host < without.host


def test_generating_holds_what_is_dense_and_the_planes_that_are_asked_for() -> None:
    sizes = shapes()
    low, high = (plan.generating(sizes, planes, 128, 10, 20, on_gpu=False) for planes in (2, 8))
    assert high.host - low.host == sizes.quantized * 6 // 8
    dense, scales = (sizes.parameters - sizes.quantized) * 4, 2 * sizes.quantized // 128
    assert low.host > dense + sizes.quantized // 4 + scales
    there = plan.generating(sizes, 2, 128, 10, 20, on_gpu=True)
    assert there.device > dense + sizes.quantized // 4 + scales
    longer = plan.generating(sizes, 2, 128, 10, 1020, on_gpu=True)
    assert longer.device - there.device == 2 * sizes.blocks * 1000 * sizes.hidden * 4


def make(host: int, **free: int) -> plan.Plan:
    need = plan.Need(stage="quantize", device=0, host=host, disk=0)
    made = plan.make_plan(shapes(), [need], 1e9, device=CPU, place=CPU, store=Path("store"), group_size=128)
    return dataclasses.replace(made, **free)


def test_what_cannot_fit_is_refused_with_what_would_help() -> None:
    make(10).refuse()
    with pytest.raises(
        UserError, match=r"needs about .* GB of memory, but there are 1\.00 GB\. Follow fewer method.streams"
    ):
        make(10 * GB, host_free=GB).refuse()
    with pytest.raises(UserError, match="room on the disk of store.path.*set store.path to another disk"):
        dataclasses.replace(make(10), disk=machine.disk_free(Path("/tmp")) + GB).refuse()


def test_the_advice_is_for_the_stage_that_needs_most() -> None:
    needs = [plan.Need(stage=stage, device=0, host=host, disk=0) for stage, host in (("evaluate", 1), ("generate", 2))]
    made = plan.make_plan(shapes(), needs, 1e9, device=CPU, place=None, store=Path("store"), group_size=128)
    assert "hidden states" not in made.sentence()
    with pytest.raises(UserError, match="Generating holds the whole model. Ask for lower bits"):
        dataclasses.replace(made, host_free=0).refuse()


def test_text_that_cannot_be_generated_is_refused_before_the_model_is_loaded(
    matquant, small_model, monkeypatch
) -> None:
    monkeypatch.setattr("matquant.generating.generate", lambda *_: pytest.fail("it was loaded"))
    small = (*SMALL, f"model.path={small_model}", "method=rtn", "method.group_size=64", "bits=4")
    assert matquant(*small, "stages=[quantize]")[0] == 0
    monkeypatch.setattr(machine, "host_free", lambda: -(10**9))
    status, _, err = matquant(*small, "stages=[generate]", "prompt=def", "max_new_tokens=2")
    assert status == 2
    assert "Generating holds the whole model" in err


def test_a_job_that_cannot_fit_ends_before_it_starts(matquant, small_model, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "host_free", lambda: -(10**9))
    small = (*SMALL, f"model.path={small_model}", "method=rtn", "method.group_size=64", "bits=4")
    status, _, err = matquant(*small)
    assert status == 2
    assert "GB of memory" in err
    assert not list((tmp_path / "store").glob("parent/*"))
    assert matquant(*small, "runtime.check_memory=false")[0] == 0


def test_the_plan_was_right_within_a_fifth_and_stands_in_the_results(run_py, small_model, tmp_path) -> None:
    process = run_py(*SMALL, f"model.path={small_model}", "method=gptq", "method.group_size=64", "bits=[2,4]")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "plan: 0.3 M parameters" in out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = results["resources"]
    assert found["plan"]["host_peak"] == pytest.approx(found["host_peak"], rel=0.2)
    assert found["plan"]["seconds"] > 0
    assert found["quantize_seconds"].keys() == {"prepare", "load", "forward", "moments", "solve", "errors", "write"}
    job = [*SMALL, f"model.path={small_model}", "method=gptq", "method.group_size=64", "bits=4", "stages=[generate]"]
    process = run_py(*job, "prompt=def", "max_new_tokens=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    generated = json.loads((tmp_path / "run" / "results.json").read_text())["resources"]
    assert generated["plan"]["worst_on_host"] == "generate"
    assert generated["plan"]["host_peak"] == pytest.approx(generated["host_peak"], rel=0.2)
    assert {row["reason"] for row in results["unquantized_parameters"]} == {
        "embeddings, tied to the head",
        "norm or bias",
    }
