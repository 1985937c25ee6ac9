"""Run a few steps of ``refine=scales`` of a random 8B model; record memory, planned and measured, and seconds of a step.

    python experiments/benchmarks/measure_refinement.py FOLDER --out 8b.json             # 32 blocks
    python experiments/benchmarks/measure_refinement.py FOLDER --out 80gb.json --steps 12 --gpu-gb 80
    python experiments/benchmarks/measure_refinement.py FOLDER --out small.json --blocks 2 --width 0.015625 --vocabulary 2048 \
        refine.text.sequences=16 refine.text.sequence_length=32

Makes the model in FOLDER if it is missing (or takes that of ``--model``), and its parent by rounding to nearest in the store in
FOLDER; a second run finds both. The parent has the codes of the default method, but no scales of its own at low bits. Training
is that of the stage refine, with the settings and the text of the preset; ``--steps`` alone is smaller. Further arguments are
overrides of the config. The refined parent is deleted.

The JSON is rewritten after each event, so that an interrupted run has all events before. ``planned`` is the memory plan of such
a job. ``measured`` has three peaks of the device: ``allocated`` counts tensors, ``needed`` also the memory that CUDA graphs
keep for tensors inside a pass, and ``reserved`` torch's cache of freed blocks too. ``device_used`` is what the driver counts,
for all processes. ``ratio`` is ``needed`` over the plan; a CPU has none, since the peak of a process includes what was before.
``extrapolated`` is the time of the whole job with the default number of steps and validations, without loading the model and
quantizing.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from event_timeline import TimedDraft, Timeline, device_index
from hydra import compose, initialize_config_dir
from make_llama import INDEX, make

from matquant import cli, machine
from matquant.config import Config, from_hydra
from matquant.config_check import check_config
from matquant.distributed import SINGLE_PROCESS
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.memory import MemoryPlan
from matquant.paths import resource_root
from matquant.refine.config import RefineConfig
from matquant.refine.refinement import RefineContext
from matquant.refine.scale_refinement import ScaleRefinement
from matquant.report.provenance import provenance
from matquant.stages.load import LoadedJob, load_job
from matquant.stages.plan import plan_without_quantize
from matquant.stages.quantize import quantize
from matquant.stages.runtime import Runtime
from matquant.store import Draft, Store

GOAL_MINUTES = 90  # of the whole job on one GPU of 80 GB
GOAL_RATIO = 0.15  # largest distance of the measured from the planned memory, as a share of the plan
WARM_UP = 2  # steps: the first captures the CUDA graphs
# Codes as of the default method, in the time of rounding.
PARENT = [
    "method=rtn",
    "method.per_bit_models=false",
    "method.slicing=msb",
    "method.zero_point_offset=8",
    "method.stretch=1.25",
]


def make_config(model: Path, folder: Path, overrides: list[str]) -> Config:
    """Config of a job that makes the parent and refines it.

    Raises:
        UserError: a setting is out of range.
    """
    cli.register()
    own = [
        f"model.path={model}",
        f"store.path={folder / 'store'}",
        "refine=scales",
        "stages=[quantize]",
        "tracking=none",
    ]
    with initialize_config_dir(str(resource_root() / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", [*PARENT, *own, *overrides]))
    check_config(config)
    return config


@contextlib.contextmanager
def temporary_store(store: Store) -> Iterator[Store]:
    """Empty store on the same disk, which is deleted at the end."""
    with tempfile.TemporaryDirectory(dir=store.path) as folder:
        yield Store(Path(folder))


def run_steps(
    job: LoadedJob, parent: Parent, config: RefineConfig, runtime: Runtime, timeline: Timeline
) -> dict[str, Any]:
    """Refine for ``config.steps`` steps. Returns the held-out KL of each validation and the bytes that were saved."""
    text = job.refinement
    assert text is not None
    training, validation = text.split(text.read)
    context = RefineContext(
        blocks=job.blocks,
        parent=parent,
        windows=training,
        validation=validation,
        batch_size=text.batch_size,
        device=runtime.device,
        dtype=job.dtype,
        progress=lambda steps: timeline.add("step") if steps else None,
        validated=lambda step, _: timeline.add("validation" if step else "start and validation"),
    )
    refinement = ScaleRefinement(config, context)
    found: dict[str, Any] = {}

    def build(draft: Draft) -> dict[str, Any]:
        timed = TimedDraft(draft, timeline, {block["file"] for block in parent.blocks})
        refinement.run(timed)
        found["saved_bytes"] = timed.saved_bytes
        return {}

    with temporary_store(runtime.store) as store:
        store.open_or_build("refined", {"method": config.method}, build)
        timeline.add("commit")
    return found | {"history": refinement.history, "warnings": refinement.warnings}


def extrapolate(timeline: Timeline, config: RefineConfig) -> dict[str, Any]:
    """Seconds of a whole job from a timeline: start, steps, validations with the saved state, and writing.

    Args:
        config: of the whole job.
    """
    warm = timeline.seconds("step")[WARM_UP:]
    step, validation, save = (
        statistics.median(found) for found in (warm, timeline.seconds("validation"), timeline.seconds("save"))
    )
    validations = math.ceil(config.steps / config.validate_every)
    start = sum(timeline.seconds("start and validation")) + sum(timeline.seconds("step")[:WARM_UP])
    parts = {
        "start": start,
        "steps": (config.steps - WARM_UP) * step,
        "validations": validations * validation,
        "saved states": validations * save,
        "writing": sum(timeline.seconds("write a block")) + sum(timeline.seconds("commit")),
    }
    return {
        "steps": config.steps,
        "validations": validations,
        "seconds_per_step": round(step, 4),
        "slowest_step": max(warm),
        "seconds": {name: round(seconds, 2) for name, seconds in parts.items()},
        "minutes": round(sum(parts.values()) / 60, 2),
    }


def summarize(timeline: Timeline, plan: MemoryPlan, config: RefineConfig) -> dict[str, Any]:
    """Planned and measured memory with their ratio, time of the whole job, and whether the goals are met."""
    peaks = timeline.peaks()
    planned = {"device": plan.device_peak, "host": plan.host_peak, "disk": plan.disk, "seconds": round(plan.seconds, 1)}
    measured = peaks | {"host": machine.host_peak()}
    ratios = {name: round(size / planned["device"], 4) for name, size in peaks.items()}
    ratio = ratios.get("needed")
    whole = extrapolate(timeline, config)
    return {
        "planned": planned,
        "measured": measured,
        "ratio": ratio,
        "ratios": ratios,
        "extrapolated": whole,
        "goals": {
            "memory": None if ratio is None else abs(ratio - 1) <= GOAL_RATIO,
            "minutes": whole["minutes"] <= GOAL_MINUTES,
        },
    }


def measure(
    job: LoadedJob, parent: Parent, runtime: Runtime, steps: int, record: dict[str, Any], write: Callable[[], None]
) -> None:
    """Plan and run the refinement; fill ``record``.

    Raises:
        UserError: the plan needs more memory or disk than there is.
    """
    config = job.config.refine
    release(runtime.device)
    plan = plan_without_quantize(job, runtime)
    assert plan is not None
    print(f"refine={config.name}: {plan.sentence()}", flush=True)
    record["plan"] = dataclasses.asdict(plan)
    short = dataclasses.replace(config, steps=steps)
    shortened = plan_without_quantize(
        dataclasses.replace(job, config=dataclasses.replace(job.config, refine=short)), runtime
    )
    if runtime.check_memory and shortened is not None:  # the whole job saves more states
        shortened.refuse()
    timeline = Timeline(runtime.device, write)
    record["events"] = timeline.events
    record |= run_steps(job, parent, short, runtime, timeline)
    record |= summarize(timeline, plan, config)
    write()


def release(device: torch.device) -> None:
    """Return what earlier work left on the device, and begin new peaks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Let torch allocate at most so many GB (1e9 bytes) on the device; None for all."""
    if gigabytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device_index(device))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Arguments of the command line, and overrides of the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the model and the store")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, more than two")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, instead of a random one")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0, help="factor on all sizes of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--gpu-gb", type=float, help="limit of torch's memory on a larger GPU, in GB (1e9 bytes)")
    arguments, overrides = parser.parse_known_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, the steps of the warm-up; found {arguments.steps}")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: {arguments.out.parent} is no folder; make it, or name a file in another one")
    return arguments, overrides


def measure_all(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Make the model and the parent, and measure the refinement. Returns the content of the JSON file.

    Raises:
        UserError: a setting is out of range, or there is too little memory or disk.
    """
    name = f"llama-{arguments.width:g}-{arguments.vocabulary}-{arguments.blocks}"
    model = arguments.model or arguments.folder / name
    config = make_config(model, arguments.folder, overrides)
    machine.use_threads(config.runtime.threads)
    machine.tune_malloc()
    device = machine.device(config.runtime.device)
    seconds: dict[str, float] = {}
    record: dict[str, Any] = {}
    results = {
        "provenance": provenance(),
        "overrides": overrides,
        "steps": arguments.steps,
        "gpu_gb": arguments.gpu_gb,
        "seconds": seconds,
        "refinements": {"scales": record},
    }

    def write() -> None:
        temporary = arguments.out.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(arguments.out)

    def timed(phase: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        seconds[phase] = round(time.perf_counter() - start, 2)
        print(f"{phase}: {seconds[phase]} s", flush=True)
        write()
        return found

    write()
    limit_memory(device, arguments.gpu_gb)
    if arguments.model is None and not (model / INDEX).is_file():
        sizes = (arguments.blocks, arguments.width, arguments.vocabulary)
        timed("make the model", lambda: make(model, *sizes, device=device.type))
    runtime = Runtime.of(config, device, SINGLE_PROCESS)
    job = timed("load and check", lambda: load_job(config, runtime))
    results |= {"sizes": dataclasses.asdict(job.sizes), "dtype": str(job.dtype)}
    parent = timed("make the parent", lambda: quantize(job, runtime).parent)
    results["parent_bytes"] = parent.artifact.bytes
    timed("refine=scales", lambda: measure(job, parent, runtime, arguments.steps, record, write))
    return results


def describe(record: dict[str, Any]) -> str:
    """Line of the terminal for the refinement."""
    whole, ratio = record["extrapolated"], record["ratio"]
    memory = "" if ratio is None else f"{record['measured']['needed'] / 1e9:.2f} GB, {ratio:.3f} of the plan; "
    return (
        f"refine=scales: {memory}{whole['seconds_per_step']:.3f} s a step; {whole['steps']} steps in "
        f"{whole['minutes']:.1f} min"
    )


def main() -> None:
    """Measure what the command line names."""
    try:
        results = measure_all(*parse_arguments())
    except UserError as error:
        sys.exit(f"error: {error}")
    print(describe(results["refinements"]["scales"]))


if __name__ == "__main__":
    main()
