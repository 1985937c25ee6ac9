"""Quantizes a random model of the 8B shape on this machine's device and writes down seconds by phase and peaks of memory.

    python experiments/scale/measure.py FOLDER --out results.json                                # 32 blocks, 2 M tokens
    python experiments/scale/measure.py FOLDER --out results.json --blocks 4 method.streams=[8] method.asymmetric=false

Makes the model in FOLDER if it is not there. The calibration text is random tokens, since weights are random too. Further
arguments are overrides of the config. The JSON is written anew after each block, so that a run which is cut short, or ends by
itself after ``--seconds``, still tells what a block takes. A row of ``blocks`` holds the seconds between the last solved layers
of two blocks: the first one's also those of what comes before it.

Beside the times stand the model's multiplications and additions, counted, and the rates of matrix products, measured here.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from make_llama import INDEX, make

from matquant import cli, machine
from matquant.config import Config, from_hydra
from matquant.models.activations import choose_place
from matquant.models.blocks import BlockModel
from matquant.models.load import LoadedModel, open_model
from matquant.options import solver_options
from matquant.quantize.driver import CalibrationOptions, Driver, layers_to_quantize
from matquant.store import Store

DEFAULTS = ["calibration.sequences=1024", "calibration.sequence_length=2048", "calibration.batch_size=8"]


class Enough(Exception):
    """Ends the run when its time is over."""


class Record:
    """What is known so far, in a file that is whole at every moment."""

    def __init__(self, path: Path, device: torch.device, about: dict[str, Any]) -> None:
        self.path, self.device = path, device
        self.start = self.last = time.perf_counter()
        self.found: dict[str, Any] = about | {"seconds": {}, "blocks": [], "finished": False}
        self.phases: dict[str, float] = {}

    def lap(self) -> float:
        """Seconds since it was last called."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        made = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.found["seconds"][name] = round(self.lap(), 3)
        self.write()
        return made

    def block(self, phases: dict[str, float]) -> None:
        """The seconds of each phase since the last block."""
        row = {phase: round(value - self.phases.get(phase, 0.0), 3) for phase, value in phases.items()}
        self.phases = dict(phases)
        self.found["blocks"].append({"seconds": round(self.lap(), 3), **row})
        self.write()

    def write(self) -> None:
        self.found["seconds"]["total"] = round(time.perf_counter() - self.start, 3)
        self.found["device_peak"] = machine.device_peak(self.device)
        self.found["host_peak"] = machine.host_peak()
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(self.path)


def configure(folder: Path, overrides: list[str]) -> Config:
    """The config of a job on the model in ``folder``."""
    cli.register()
    with initialize_config_dir(str(cli.home() / "conf"), version_base="1.3"):
        return from_hydra(compose("config", [f"model.path={folder}", *DEFAULTS, *overrides]))


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in ``dtype``, the best of three."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        del product
    return 2 * side**3 / min(times[1:])


def limits(config: Config, blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP of calibrating one block (attention's scores not counted), and the rates of this device.

    A stage runs its block up to its layers, and one more pass makes what enters the next block.
    """
    method, text = config.method, config.calibration
    tokens = text.sequences * text.sequence_length
    streams = len(method.streams) + method.asymmetric
    sizes = {name.rsplit(".", 1)[-1]: layer.weight.shape for name, layer in blocks.linears(0).items()}
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    before = [
        sum(sizes[n].numel() for n in order[:count]) for count in (3, 4, 6, 7)
    ]  # of o, gate and up, down, the next
    passes = before if method.staged else before[2:]
    inputs = [sizes[name][1] for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    kinds = len(method.streams) * (1 + method.asymmetric)
    return {
        "forward_flop": 2.0 * tokens * streams * sum(passes),
        "moments_flop": 2.0 * tokens * kinds * sum(columns**2 for columns in inputs),
        "hidden_states_bytes": 1.0 * tokens * streams * inputs[0] * dtype.itemsize,
        "flop_per_second": rate(device, dtype),
        "float32_flop_per_second": rate(device, torch.float32),
    }


def quantize(config: Config, loaded: LoadedModel, blocks: BlockModel, record: Record, arguments: Any) -> None:
    """Make the parent in a store of its own; raises Enough when the time is over."""
    device, method, text = record.device, config.method, config.calibration
    dtype = loaded.compute_dtype(device)
    layers = layers_to_quantize(blocks, method.skips, head=method.head)
    options = solver_options(method, config.objective.lambdas, method.master_bits, loaded.dtype)
    shape = (text.sequences, text.sequence_length)
    windows = torch.randint(arguments.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    streams = len(method.streams) + method.asymmetric
    needed = streams * windows.numel() * blocks.model.config.hidden_size * dtype.itemsize
    scratch = arguments.folder / "scratch"
    place = {"auto": choose_place(needed, device, scratch), "file": scratch}.get(arguments.place)
    place = torch.device(arguments.place) if place is None else place
    record.found["place"] = "file" if isinstance(place, Path) else str(place)
    left = [len(block) for block in layers]

    def progress(count: int) -> None:
        left[0] -= count
        if left[0] == 0:
            left.pop(0)
            record.block(driver.seconds)
            if time.perf_counter() - record.start > arguments.seconds:
                raise Enough

    driver = Driver(
        blocks, layers, options,
        CalibrationOptions(
            streams=method.streams, asymmetric=method.asymmetric, staged=method.staged, batch_size=text.batch_size
        ),
        device=device, dtype=dtype, place=place, progress=progress,
    )  # fmt: skip

    def build(draft: Any) -> dict[str, Any]:
        return {"blocks": driver.run(draft, windows)}

    Store(arguments.folder / "store").open_or_build("parent", {"now": time.time()}, build)
    record.found["seconds"]["quantize by phase"] = {phase: round(s, 3) for phase, s in driver.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the model, the parent and hidden states")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0, help="of every matrix, as a part of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--place", choices=("auto", "cuda", "cpu", "file"), default="auto", help="of hidden states")
    parser.add_argument("--seconds", type=float, default=540, help="stop after the block in which they are over")
    arguments, overrides = parser.parse_known_args()
    model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{arguments.blocks}"
    config = configure(model, overrides)
    machine.use_threads(config.runtime.threads)
    machine.give_back_memory()
    device = machine.device(config.runtime.device)
    about = {
        "overrides": overrides, "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cores": machine.cores(), "torch": torch.__version__, "python": platform.python_version(),
        "shape": {"blocks": arguments.blocks, "width": arguments.width, "vocabulary": arguments.vocabulary},
        "tokens": config.calibration.sequences * config.calibration.sequence_length,
    }  # fmt: skip
    record = Record(arguments.out, device, about)
    if not (model / INDEX).is_file():
        shape = (arguments.blocks, arguments.width, arguments.vocabulary)
        record.timed("make the model", lambda: make(model, *shape, device=device.type))
    loaded = record.timed("open", lambda: open_model(config.model))
    blocks = BlockModel(loaded.model, loaded.checkpoint)
    record.timed("check", lambda: blocks.check(device, loaded.compute_dtype(device)))
    record.found["limits"] = record.timed("rates", lambda: limits(config, blocks, device, loaded.compute_dtype(device)))
    try:
        record.timed("quantize", lambda: quantize(config, loaded, blocks, record, arguments))
        record.found["finished"] = True
    except Enough:
        pass
    record.write()
    print(json.dumps({k: v for k, v in record.found.items() if k != "blocks"}, indent=1))


if __name__ == "__main__":
    main()
