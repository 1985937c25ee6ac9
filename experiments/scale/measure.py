"""Quantizes a random model of the 8B shape on this machine's device and writes down seconds by phase and peaks of memory.

    python experiments/scale/measure.py FOLDER --out results.json                                # 32 blocks, 2 M tokens
    python experiments/scale/measure.py FOLDER --out results.json --blocks 4 method.calibration_bits=[8] method.asymmetric_calibration=false

Makes the model in FOLDER if it is not there. The calibration text is random tokens, since weights are random too. Further
arguments are overrides of the config. The JSON is written anew after each block, so that a run which is cut short, or which
ends by itself once the process has lived for ``--seconds``, still tells what a block takes. A row of ``blocks`` holds the
seconds of one block, by phase, and its mean errors: the first one's seconds also those of what comes before it.

Beside the peaks stands what the plan of such a job says (of the host without what the process has before), and beside the
times the operations of each phase, counted, and the rates of matrix products and copies, measured here:
together they give ``floor``, the seconds of the whole model at those rates.
"""

import argparse
import contextlib
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra import compose, initialize_config_dir
from make_llama import INDEX, make
from matquant.options import solver_options
from torch import Tensor

from matquant import cli, machine, plan
from matquant.calibration.hessian import PANEL
from matquant.config import Config, from_hydra
from matquant.models.activation_cache import OffloadTarget, choose_offload_target
from matquant.models.blocks import BlockModel
from matquant.models.loading import LoadedModel, open_model
from matquant.models.model_sizes import measure
from matquant.models.tracing import check
from matquant.quantize.driver import CalibrationOptions, Driver, layers_to_quantize
from matquant.store import Store

DEFAULTS = ["calibration.sequences=1024", "calibration.sequence_length=2048", "calibration.batch_size=8"]


class Enough(Exception):
    """Ends the run when its time is over."""


def lived() -> float:
    """Seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


class Record:
    """What is known so far, in a file that is whole at every moment."""

    def __init__(self, path: Path, device: torch.device, about: dict[str, Any]) -> None:
        self.path, self.device = path, device
        self.last = time.perf_counter()
        self.found: dict[str, Any] = about | {
            "seconds": {"imports": round(lived(), 3)},
            "blocks": [],
            "finished": False,
        }
        self.phases: dict[str, float] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.last = time.perf_counter()
            self.found["seconds"][name] = round(self.last - start, 3)
            self.write()

    def block(self, phases: dict[str, float], errors: dict[str, float]) -> None:
        """A row with the seconds of each phase since the last one."""
        spent = {phase: round(value - self.phases.get(phase, 0.0), 3) for phase, value in phases.items()}
        self.phases = dict(phases)
        before, self.last = self.last, time.perf_counter()
        self.found["blocks"].append({"seconds": round(self.last - before, 3), **spent, "mean_errors": errors})
        self.found["seconds"]["quantize by phase"] = {phase: round(s, 3) for phase, s in phases.items()}
        self.write()
        print(f"block {len(self.found['blocks'])}: {self.found['blocks'][-1]}, in all {lived():.1f} s", flush=True)

    def write(self) -> None:
        self.found["seconds"]["total"] = round(lived(), 3)
        self.found["device_peak"] = machine.device_peak(self.device)
        self.found["host_peak"] = machine.host_peak()
        if (
            self.device.type == "cuda"
        ):  # what torch keeps for later tensors, and what the driver and kernels have, on top
            free, whole = torch.cuda.mem_get_info(self.device)
            self.found["device_reserved_peak"] = torch.cuda.max_memory_reserved(self.device)
            self.found["device_used_peak"] = max(whole - free, self.found.get("device_used_peak", 0))
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(self.path)


def configure(folder: Path, overrides: list[str]) -> Config:
    """The config of a job on the model in ``folder``."""
    cli.register()
    with initialize_config_dir(str(cli.resource_root() / "conf"), version_base="1.3"):
        return from_hydra(compose("config", [f"model.path={folder}", *DEFAULTS, *overrides]))


def fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the least of three; once before to warm up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of large matrix products, and bytes a second from the host's memory to the device."""
    side = 8192 if device.type == "cuda" else 1024
    found = {}
    for name, kind in (("flop_per_second", dtype), ("float32_flop_per_second", torch.float32)):
        matrix = torch.randn(side, side, device=device, dtype=kind)
        found[name] = 2 * side**3 / fastest(lambda m=matrix: m @ m, device)
    if device.type == "cuda":
        host = torch.ones(2**28, dtype=torch.uint8)
        found["copied_bytes_per_second"] = host.nbytes / fastest(lambda: host.to(device), device)
        locked = host.pin_memory()
        found["copied_bytes_per_second_page_locked"] = host.nbytes / fastest(lambda: locked.to(device), device)
    return found


def operations(config: Config, blocks: BlockModel, dtype: torch.dtype) -> dict[str, float]:
    """FLOP of one block by phase, and the bytes of hidden states.

    A stage runs its block up to its layers, and one more pass makes what enters the next block. What the solver multiplies are
    feedback to later columns, gradients, and the targets of asymmetric calibration.
    """
    method, text = config.method, config.calibration
    tokens = text.sequences * text.sequence_length
    streams, widths = len(method.calibration_bits) + method.asymmetric_calibration, len(config.objective.lambdas)
    sizes = {name.rsplit(".", 1)[-1]: layer.weight.shape for name, layer in blocks.linears(0).items()}
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Weights in front of o, of gate and up, of down, and of the next block.
    passes = [sum(sizes[n].numel() for n in order[:count]) for count in (3, 4, 6, 7)]
    passes = passes if method.true_sequential else passes[2:]
    hidden = sizes["q_proj"][1]
    scores = len(passes) * text.sequence_length * hidden  # half of a square for q k and half of one for p v
    squares = sum(
        n * (n + min(n, PANEL)) for n in (sizes[name][1] for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    )
    crossed = sum(2 * sizes[name][1] ** 2 for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    product = sum(2.0 * rows * columns**2 for rows, columns in sizes.values())
    return {
        "forward_flop": 2.0 * tokens * streams * (sum(passes) + scores),
        "moments_flop": 1.0 * tokens * len(method.calibration_bits) * (squares + method.asymmetric_calibration * crossed),
        "solve_float32_flop": product
        * (widths * (0.5 + 1.5 * method.cd_passes) + method.asymmetric_calibration * len(method.calibration_bits)),
        "errors_float32_flop": product * (widths + len(method.calibration_bits)),
        "hidden_states_bytes": 1.0 * tokens * streams * hidden * dtype.itemsize,
    }


def limits(config: Config, blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Operations of one block, the rates of this device, and the seconds that all blocks take at least."""
    counted, measured = operations(config, blocks, dtype), rates(device, dtype)
    floor = {
        phase: len(blocks) * counted[f"{phase}_{kind}flop"] / measured[f"{kind}flop_per_second"]
        for phase, kind in (("forward", ""), ("moments", ""), ("solve", "float32_"), ("errors", "float32_"))
    }
    return counted | measured | {"floor": {phase: round(seconds, 2) for phase, seconds in floor.items()}}


def place_of(asked: str, needed: int, device: torch.device, scratch: Path) -> OffloadTarget:
    """Where hidden states wait."""
    if asked == "auto":
        return choose_offload_target(needed, device, scratch)
    return scratch if asked == "file" else torch.device(asked)


def mean_errors(block: dict[str, Any]) -> dict[str, float]:
    """Of each width, the mean over the layers of a block of the share of the outputs' energy that is lost."""
    rows = [layer["errors"] for layer in block["layers"].values()]
    return {bits: sum(row[bits] for row in rows) / len(rows) for bits in rows[0]}


def quantize(config: Config, loaded: LoadedModel, blocks: BlockModel, record: Record, arguments: Any) -> None:
    """Make the parent in a store of its own; raises Enough when the time is over."""
    device, method, text = record.device, config.method, config.calibration
    dtype = loaded.compute_dtype(device)
    layers = layers_to_quantize(blocks, method.skips, head=method.quantize_lm_head)
    options = solver_options(method, config.objective.lambdas, method.master_bits, loaded.dtype)
    shape = (text.sequences, text.sequence_length)
    windows: Tensor = torch.randint(arguments.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    needed = int(record.found["limits"]["hidden_states_bytes"])
    place = place_of(arguments.place, needed, device, arguments.folder / "scratch")
    record.found["place"] = "file" if isinstance(place, Path) else str(place)
    job = plan.Calibrating(
        tokens=windows.numel(),
        batch=text.batch_size * text.sequence_length,
        streams=len(method.calibration_bits),
        widths=len(options.widths),
        asymmetric=method.asymmetric_calibration,
        staged=method.true_sequential,
        group_size=options.group_size,
    )
    on_gpu = device.type == "cuda"
    need = plan.quantizing(
        measure(blocks, layers, loaded.dtype, dtype), job, on_gpu=on_gpu, solver_on_gpu=on_gpu, place=place
    )
    record.found["planned"] = {"device": need.device, "host": need.host}

    def finished(about: dict[str, Any]) -> None:
        record.block(driver.phases.seconds, mean_errors(about))
        if len(record.found["blocks"]) < len(layers) and lived() > arguments.seconds:
            raise Enough

    driver = Driver(
        blocks,
        layers,
        options,
        CalibrationOptions(
            streams=method.calibration_bits, asymmetric=method.asymmetric_calibration, staged=method.true_sequential, batch_size=text.batch_size
        ),
        device=device,
        dtype=dtype,
        place=place,
        finished=finished,
    )

    def build(draft: Any) -> dict[str, Any]:
        return {"blocks": driver.run(draft, windows)}

    parent = Store(arguments.folder / "store").open_or_build("parent", {"now": time.time()}, build)
    record.found |= {"parent_bytes": parent.bytes, "finished": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the model, the parent and hidden states")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0, help="of every matrix, as a part of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--place", choices=("auto", "cuda", "cpu", "file"), default="auto", help="of hidden states")
    parser.add_argument(
        "--seconds", type=float, default=540, help="of the process, after which it stops at the end of a block"
    )
    arguments, overrides = parser.parse_known_args()
    model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{arguments.blocks}"
    config = configure(model, overrides)
    machine.use_threads(config.runtime.threads)
    machine.give_back_memory()
    device = machine.device(config.runtime.device)
    about = {
        "overrides": overrides,
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cores": machine.cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"blocks": arguments.blocks, "width": arguments.width, "vocabulary": arguments.vocabulary},
        "tokens": config.calibration.sequences * config.calibration.sequence_length,
    }
    record = Record(arguments.out, device, about)
    if not (model / INDEX).is_file():
        sizes = (arguments.blocks, arguments.width, arguments.vocabulary)
        record.timed("make the model", lambda: make(model, *sizes, device=device.type))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    loaded = record.timed("open", lambda: open_model(config.model))
    blocks = BlockModel(loaded.model, loaded.checkpoint)
    dtype = loaded.compute_dtype(device)
    record.timed("check", lambda: check(blocks, device, dtype))
    record.found["limits"] = record.timed("rates", lambda: limits(config, blocks, device, dtype))
    with contextlib.suppress(Enough):
        record.timed("quantize", lambda: quantize(config, loaded, blocks, record, arguments))
    record.write()
    print(json.dumps({k: v for k, v in record.found.items() if k != "blocks"}, indent=1))


if __name__ == "__main__":
    main()
