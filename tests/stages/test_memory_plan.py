"""Memory plan of a job: estimates, advice, refusals, and comparison with measured peaks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import SMALL

from matquant import machine
from matquant.errors import UserError
from matquant.evaluate.memory import evaluate_memory
from matquant.memory import MemoryEstimate, MemoryPlan, make_plan
from matquant.models.model_sizes import LayerSize, ModelSizes
from matquant.quantize.base import CalibrationTokens, QuantizerTask
from matquant.quantize.gptq.config import GptqConfig
from matquant.quantize.memory import quantize_memory
from matquant.quantize.rtn.config import RtnConfig
from matquant.refine.config import RefineConfig
from matquant.refine.memory import (
    refine_launch_seconds,
    refine_memory,
    refine_operations,
    trained_scales_bytes,
    trained_weights_bytes,
)
from matquant.stages.generate import generate_memory

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GB = 10**9
BITS = (2, 3, 4, 6, 8)
TOKENS = CalibrationTokens(total=4096, batch=512)


def model_sizes(blocks: int = 4, hidden: int = 1024, inner: int = 4096) -> ModelSizes:
    shapes = (
        [(hidden, hidden, 0, 0)] * 3 + [(hidden, hidden, 1, 1)] + [(inner, hidden, 2, 2)] * 2 + [(hidden, inner, 3, 3)]
    )
    layers = [LayerSize(rows=r, columns=c, input=i, stage=s) for r, c, i, s in shapes]
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


GPTQ = GptqConfig()


def estimate(
    method=GPTQ, *, bits=BITS, tokens=TOKENS, blocks=4, on_gpu=False, solver_on_gpu=False, offload=CPU
) -> MemoryEstimate:
    task = QuantizerTask(lambdas=dict.fromkeys(bits, 1.0), master_bits=8, dtype=torch.float16)
    return quantize_memory(
        model_sizes(blocks),
        method.build(task),
        tokens,
        model_sizes(blocks).quantized,
        on_gpu=on_gpu,
        solver_on_gpu=solver_on_gpu,
        offload=offload,
    )


def test_memory_does_not_grow_with_depth_and_the_disk_does() -> None:
    shallow, deep = estimate(blocks=2), estimate(blocks=32)
    assert shallow.host == deep.host
    assert deep.disk == 16 * shallow.disk
    evaluated = [evaluate_memory(model_sizes(n), 4096, 512, 8, 5, on_gpu=False, offload=CPU) for n in (2, 32)]
    assert evaluated[0] == evaluated[1]


def test_hidden_states_count_where_they_are_stored() -> None:
    cached = 6 * 4096 * 1024 * 4
    in_memory, in_a_file = estimate(), estimate(offload=Path("scratch"))
    assert in_memory.host - in_a_file.host == cached == in_a_file.disk - in_memory.disk
    gpu = torch.device("cuda")
    on_gpu, beside = (estimate(on_gpu=True, solver_on_gpu=True, offload=device) for device in (gpu, CPU))
    assert on_gpu.device - beside.device == cached == beside.host - on_gpu.host


@pytest.mark.parametrize(
    "change",
    [
        {"method": GptqConfig(calibration_bits=(8,))},
        {"method": GptqConfig(asymmetric_calibration=False)},
        {"bits": (2, 8)},
        {"tokens": CalibrationTokens(total=1024, batch=512)},
        {"method": RtnConfig(), "tokens": CalibrationTokens(total=0, batch=512)},
    ],
)
def test_the_advice_lowers_the_estimate(change: dict) -> None:
    assert estimate(**change).host < estimate().host


def test_the_hessians_of_the_widest_input_are_counted() -> None:
    square = 4096**2 * 4
    assert estimate().host > 4 * 2 * square + 5 * 3 * square


def test_the_solver_is_counted_on_its_device() -> None:
    on_gpu, on_cpu = (estimate(on_gpu=True, solver_on_gpu=device) for device in (True, False))
    assert on_gpu.device > on_cpu.device
    assert on_gpu.host < on_cpu.host


def test_generating_holds_the_dense_parameters_and_the_planes_that_are_read() -> None:
    sizes = model_sizes()
    packed, parent = sizes.quantized // 4, sizes.quantized
    low, high = (generate_memory(sizes, size, parent, 10, 20, on_gpu=False) for size in (packed, 4 * packed))
    assert high.host - low.host == 3 * packed
    dense = (sizes.parameters - sizes.quantized) * 4
    assert low.host > dense + packed + parent // sizes.blocks
    on_gpu = generate_memory(sizes, packed, parent, 10, 20, on_gpu=True)
    assert on_gpu.device > dense + packed
    longer = generate_memory(sizes, packed, parent, 10, 1020, on_gpu=True)
    assert longer.device - on_gpu.device == 2 * sizes.blocks * 1000 * sizes.hidden * 4


def refined(blocks: int = 4, **changes: Any) -> MemoryEstimate:
    sizes = model_sizes(blocks)
    trained = trained_scales_bytes(sizes, len(changes.pop("bits", (2, 3, 4))), groups=10**6)
    fields: dict[str, Any] = {"trained": trained, "parent": sizes.quantized}
    fields |= {
        "windows": 1000,
        "length": 512,
        "batch": 8,
        "captured": 0,
        "on_gpu": True,
        "offload": torch.device("cuda"),
    }
    return refine_memory(sizes, **fields | changes)


@pytest.mark.parametrize(
    "change", [{"bits": (2,)}, {"length": 128}, {"batch": 2}, {"windows": 100}, {"blocks": 2}], ids=str
)
def test_the_advice_lowers_the_estimate_of_a_refinement(change: dict) -> None:
    assert refined(**change).device < refined().device


def test_a_refinement_holds_the_model_its_codes_and_its_optimizer() -> None:
    sizes = model_sizes()
    held = sizes.parameters * sizes.computing + sizes.quantized + (3 * 5 + 4) * 10**6 * 4
    cached = 1000 * 512 * sizes.hidden * sizes.computing
    one_window = refined(windows=0, batch=1, length=1).device
    assert held < one_window < 1.5 * held
    assert refined().device > held + cached
    with pytest.raises(UserError, match="A refinement holds the whole model. Lower refine.text.batch_size"):
        dataclasses.replace(plan_of([refined(on_gpu=False, offload=CPU)]), host_free=0).refuse()


def test_captured_passes_keep_the_states_between_blocks_of_each_bit_width() -> None:
    sizes = model_sizes()
    states = sizes.blocks * 8 * 512 * sizes.hidden * sizes.computing
    one, three = (refined(captured=count).device for count in (1, 3))
    assert three - one == 2 * states
    assert one > refined().device


def test_training_of_the_weights_holds_a_latent_weight_its_gradient_and_two_moments() -> None:
    sizes = model_sizes()
    weights = refined(trained=trained_weights_bytes(sizes), windows=0, batch=1, length=1)
    scales = refined(trained=trained_scales_bytes(sizes, 1, groups=1), windows=0, batch=1, length=1)
    assert weights.device > scales.device + 3 * sizes.quantized * 4
    assert weights.disk >= 3 * sizes.quantized * 4


def plan_of(
    estimates: list[MemoryEstimate], offload: torch.device | None = CPU, launch_seconds: float = 0.0
) -> MemoryPlan:
    return make_plan(
        estimates,
        {torch.float32: 1e9},
        parameters=10**6,
        checkpoint=2 * 10**6,
        parent=10**6,
        device=CPU,
        offload=offload,
        store=Path("store"),
        launch_seconds=launch_seconds,
    )


def make(host: int, **free: int) -> MemoryPlan:
    made = plan_of([MemoryEstimate(stage="quantize", device=0, host=host, disk=0)])
    return dataclasses.replace(made, **free)


def test_a_job_that_cannot_fit_is_refused_with_advice() -> None:
    make(10).refuse()
    with pytest.raises(
        UserError,
        match=r"needs about .* GB of memory, but there are 1\.00 GB\. Propagate fewer method.calibration_bits",
    ):
        make(10 * GB, host_free=GB).refuse()
    with pytest.raises(UserError, match="room on the disk of store.path.*set store.path to another disk"):
        dataclasses.replace(make(10), disk=machine.disk_free(Path("/tmp")) + GB).refuse()


def test_the_advice_is_for_the_stage_that_needs_most() -> None:
    estimates = [
        MemoryEstimate(stage=stage, device=0, host=host, disk=0) for stage, host in (("evaluate", 1), ("generate", 2))
    ]
    made = plan_of(estimates, offload=None)
    assert "hidden states" not in made.sentence()
    with pytest.raises(UserError, match="Text generation holds the whole model. Ask for lower bits"):
        dataclasses.replace(made, host_free=0).refuse()


def test_text_that_cannot_be_generated_is_refused_before_the_model_is_loaded(
    matquant, small_model, monkeypatch
) -> None:
    monkeypatch.setattr("matquant.stages.job.generate", lambda *_: pytest.fail("it was loaded"))
    small = (*SMALL, f"model.path={small_model}", "method=rtn", "method.group_size=64", "bits=4")
    assert matquant(*small, "stages=[quantize]")[0] == 0
    monkeypatch.setattr(machine, "host_free", lambda: -(10**9))
    status, _, err = matquant(*small, "stages=[generate]", "prompt=def", "max_new_tokens=2")
    assert status == 2
    assert "Text generation holds the whole model" in err


def test_the_time_of_a_refinement_counts_the_steps_of_each_bit_width() -> None:
    sizes = model_sizes()
    every, fewer = (RefineConfig(method="scales", steps=100, step_every=one) for one in ((), (1, 2, 4)))
    forward = 2 * (4 * sizes.block + sizes.head) * 512
    assert refine_operations(sizes, every, 512) == forward * 100 * (1 + 4 * 3)
    assert refine_operations(sizes, fewer, 512) == forward * 100 * (1 + 4 * 1.75)
    assert refine_launch_seconds(sizes, every) == pytest.approx(refine_launch_seconds(sizes, fewer) * 3 / 1.75)
    one = [MemoryEstimate(stage="refine", device=0, host=1, disk=0)]
    plans = [plan_of(one, launch_seconds=seconds) for seconds in (0.0, 500.0)]
    assert plans[1].seconds - plans[0].seconds == pytest.approx(500, rel=0.01)


def test_a_job_that_cannot_fit_ends_before_it_starts(matquant, small_model, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "host_free", lambda: -(10**9))
    small = (*SMALL, f"model.path={small_model}", "method=rtn", "method.group_size=64", "bits=4")
    status, _, err = matquant(*small)
    assert status == 2
    assert "GB of memory" in err
    assert not list((tmp_path / "store").glob("parent/*"))
    assert matquant(*small, "runtime.check_memory=false")[0] == 0


@pytest.mark.slow
def test_the_plan_was_right_within_a_fifth_and_stands_in_the_results(run_py, small_model, tmp_path) -> None:
    process = run_py(*SMALL, f"model.path={small_model}", "method=gptq", "method.group_size=64", "bits=[2,4]")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "plan: 0.3 M parameters" in out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = results["resources"]
    assert found["plan"]["host_peak"] == pytest.approx(found["host_peak"], rel=0.2)
    assert found["plan"]["seconds"] > 0
    assert found["quantize_seconds"].keys() == {"prepare", "load", "forward", "hessians", "solve", "errors", "write"}
    job = [*SMALL, f"model.path={small_model}", "method=gptq", "method.group_size=64", "bits=4", "stages=[generate]"]
    process = run_py(*job, "prompt=def", "max_new_tokens=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    generated = json.loads((tmp_path / "run" / "results.json").read_text())["resources"]
    assert generated["plan"]["worst_on_host"] == "generate"
    assert generated["plan"]["host_peak"] == pytest.approx(generated["host_peak"], rel=0.2)
    assert {row["reason"] for row in results["unquantized"]} == {"embeddings, tied to the head", "norm or bias"}
