"""Quantize a random model of the 8B shape on this machine's device; record seconds by phase and peak memory.

    python experiments/benchmarks/measure_scale.py FOLDER --out results.json                  # 32 blocks, 2 M tokens
    python experiments/benchmarks/measure_scale.py FOLDER --out results.json --blocks 4 \
        method.calibration_bits=[8] method.asymmetric_calibration=false

Makes the model in FOLDER if it is missing. The calibration text is random tokens, since weights are random too. Further
arguments are overrides of the config; the method must be one of GPTQ's presets.

The JSON is rewritten after each block, so that an interrupted run has complete rows. A run stops after the block in which the
process becomes older than ``--seconds``. A row of ``blocks`` holds the seconds of one block by phase and the mean errors of its
layers; the first row includes the work before the first block.

Peaks are recorded beside the memory estimate of such a job (the host's without the memory that the process already uses). The
operations of each phase are counted, and the rates of matrix products and copies are measured in the same run. ``floor`` is
the seconds of the whole model at these rates.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra import compose, initialize_config_dir
from make_llama import INDEX, make
from torch import Tensor

from matquant import cli, machine
from matquant.calibration.hessian import PANEL_COLUMNS
from matquant.config import Config, from_hydra
from matquant.models.activation_cache import OffloadTarget, choose_offload_target
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.loading import LoadedModel, open_model
from matquant.models.model_sizes import measure_model
from matquant.models.tracing import check_blockwise_forward
from matquant.quantize.base import CalibrationTokens, QuantizerTask
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.gptq.config import GptqConfig
from matquant.quantize.layer_selection import layers_to_quantize
from matquant.quantize.memory import quantize_memory
from matquant.report.provenance import provenance
from matquant.store import Store

DEFAULTS = ["calibration.sequences=1024", "calibration.sequence_length=2048", "calibration.batch_size=8"]


class TimeLimit(Exception):
    """Raised after the block in which ``--seconds`` passed."""


def process_age() -> float:
    """Seconds since this process started, imports included."""
    return time.time() - psutil.Process().create_time()


class Recorder:
    """Results so far, in a file that is complete at every moment.

    Attributes:
        results: content of the JSON file.
    """

    def __init__(self, path: Path, device: torch.device, about: dict[str, Any]) -> None:
        self.path, self.device = path, device
        self.results: dict[str, Any] = about | {
            "seconds": {"imports": round(process_age(), 3)},
            "blocks": [],
            "finished": False,
        }
        self._last = time.perf_counter()
        self._phases: dict[str, float] = {}

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """Record the seconds of a call and return its result."""
        start = time.perf_counter()
        try:
            return call()
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._last = time.perf_counter()
            self.results["seconds"][name] = round(self._last - start, 3)
            self.write()

    def add_block(self, phases: dict[str, float], errors: dict[str, float]) -> None:
        """Add a row with the seconds of each phase since the row before."""
        spent = {phase: round(seconds - self._phases.get(phase, 0.0), 3) for phase, seconds in phases.items()}
        self._phases = dict(phases)
        before, self._last = self._last, time.perf_counter()
        rows = self.results["blocks"]
        rows.append({"seconds": round(self._last - before, 3), **spent, "mean_errors": errors})
        self.results["seconds"]["quantize by phase"] = {phase: round(s, 3) for phase, s in phases.items()}
        self.write()
        print(f"block {len(rows)}: {rows[-1]}, {process_age():.1f} s in total", flush=True)

    def write(self) -> None:
        """Replace the file by the results so far, with the peaks so far."""
        self.results["seconds"]["total"] = round(process_age(), 3)
        self.results["device_peak"] = machine.device_peak(self.device)
        self.results["host_peak"] = machine.host_peak()
        if self.device.type == "cuda":
            # Includes torch's cache of freed blocks; "used" also the driver and the kernels.
            free, total = torch.cuda.mem_get_info(self.device)
            self.results["device_reserved_peak"] = torch.cuda.max_memory_reserved(self.device)
            self.results["device_used_peak"] = max(total - free, self.results.get("device_used_peak", 0))
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.path)


def make_config(folder: Path, overrides: list[str]) -> Config:
    """Config of a job on the model in ``folder``."""
    cli.register()
    with initialize_config_dir(str(cli.resource_root() / "conf"), version_base="1.3"):
        return from_hydra(compose("config", [f"model.path={folder}", *DEFAULTS, *overrides]))


def gptq_config(config: Config) -> GptqConfig:
    """Settings of the method; SystemExit for another method than GPTQ."""
    if not isinstance(config.method, GptqConfig):
        raise SystemExit(f"method={config.method.name} is not supported; use a preset of GPTQ, such as method=matgptq.")
    return config.method


def min_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Minimum time of three calls, after one warm-up call."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of large matrix products, and bytes/s of copies from host memory to the device."""
    side = 8192 if device.type == "cuda" else 1024
    rates = {}
    for name, kind in (("flop_per_second", dtype), ("float32_flop_per_second", torch.float32)):
        matrix = torch.randn(side, side, device=device, dtype=kind)
        rates[name] = 2 * side**3 / min_seconds(lambda m=matrix: m @ m, device)
    if device.type == "cuda":
        pageable = torch.ones(2**28, dtype=torch.uint8)
        rates["copied_bytes_per_second"] = pageable.nbytes / min_seconds(lambda: pageable.to(device), device)
        pinned = pageable.pin_memory()
        rates["copied_bytes_per_second_pinned"] = pinned.nbytes / min_seconds(lambda: pinned.to(device), device)
    return rates


def count_operations(config: Config, blocks: BlockModel, dtype: torch.dtype) -> dict[str, float]:
    """FLOP of one block by phase, and the bytes of the hidden states.

    With true-sequential calibration the block runs up to each group of layers, and once more for the inputs of the next block.
    The solver's products are lazy updates, gradients, and the targets of asymmetric calibration.
    """
    method, text = gptq_config(config), config.calibration
    tokens = text.sequences * text.sequence_length
    bits, asymmetric = len(method.calibration_bits), method.asymmetric_calibration
    streams, bit_widths = bits + asymmetric, len(config.objective.lambdas)
    sizes = {name.rsplit(".", 1)[-1]: layer.weight.shape for name, layer in blocks.linears(0).items()}
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Parameters of the layers before o, before gate and up, before down, and before the next block.
    passes = [sum(sizes[n].numel() for n in order[:count]) for count in (3, 4, 6, 7)]
    passes = passes if method.true_sequential else passes[2:]
    hidden = sizes["q_proj"][1]
    scores = len(passes) * text.sequence_length * hidden  # causal attention: half a square for q k and half for p v
    inputs = [sizes[name][1] for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    squares = sum(n * (n + min(n, PANEL_COLUMNS)) for n in inputs)
    cross = sum(2 * n**2 for n in inputs)
    product = sum(2.0 * rows * columns**2 for rows, columns in sizes.values())
    return {
        "forward_flop": 2.0 * tokens * streams * (sum(passes) + scores),
        "hessians_flop": 1.0 * tokens * bits * (squares + asymmetric * cross),
        "solve_float32_flop": product * (bit_widths * (0.5 + 1.5 * method.cd_passes) + asymmetric * bits),
        "errors_float32_flop": product * (bit_widths + bits),
        "hidden_states_bytes": 1.0 * tokens * streams * hidden * dtype.itemsize,
    }


def measure_limits(config: Config, blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Operations of one block, the rates of this device, and the floor: seconds of all blocks at these rates."""
    counted, rates = count_operations(config, blocks, dtype), measure_rates(device, dtype)
    floor = {
        phase: len(blocks) * counted[f"{phase}_{kind}flop"] / rates[f"{kind}flop_per_second"]
        for phase, kind in (("forward", ""), ("hessians", ""), ("solve", "float32_"), ("errors", "float32_"))
    }
    return counted | rates | {"floor": {phase: round(seconds, 2) for phase, seconds in floor.items()}}


def offload_target(choice: str, needed: int, device: torch.device, scratch: Path) -> OffloadTarget:
    """Storage of the hidden states between two blocks, from the choice on the command line."""
    if choice == "auto":
        return choose_offload_target(needed, device, scratch)
    return scratch if choice == "file" else torch.device(choice)


def mean_errors(block: dict[str, Any]) -> dict[str, float]:
    """Mean relative error of the layers of a block, by bit-width."""
    rows = [layer["errors"] for layer in block["layers"].values()]
    return {bits: sum(row[bits] for row in rows) / len(rows) for bits in rows[0]}


def quantize(
    config: Config, loaded: LoadedModel, blocks: BlockModel, recorder: Recorder, arguments: argparse.Namespace
) -> None:
    """Make the parent in a store in ``arguments.folder``. Raises TimeLimit."""
    device, method, text = recorder.device, gptq_config(config), config.calibration
    dtype = compute_dtype(loaded.dtype, device)
    layers = layers_to_quantize(blocks, method.skips, lm_head=method.quantize_lm_head)
    names = tuple(name for block in layers for name in block)
    quantizer = method.build(QuantizerTask.of(config.objective.lambdas, method.master_bits, loaded.dtype, names))
    shape = (text.sequences, text.sequence_length)
    sequences: Tensor = torch.randint(arguments.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    needed = int(recorder.results["limits"]["hidden_states_bytes"])
    offload = offload_target(arguments.offload, needed, device, arguments.folder / "scratch")
    recorder.results["offload"] = "file" if isinstance(offload, Path) else str(offload)
    on_gpu = device.type == "cuda"
    estimate = quantize_memory(
        measure_model(blocks, layers, loaded.dtype, dtype),
        quantizer,
        CalibrationTokens(total=sequences.numel(), batch=text.batch_size * text.sequence_length),
        sum(layer.parent_bytes for layer in quantizer.layer_specs(layers).values()),
        on_gpu=on_gpu,
        solver_on_gpu=on_gpu,
        offload=offload,
    )
    recorder.results["planned"] = {"device": estimate.device, "host": estimate.host}

    def finished(block: dict[str, Any]) -> None:
        recorder.add_block(driver.timer.seconds, mean_errors(block))
        if len(recorder.results["blocks"]) < len(layers) and process_age() > arguments.seconds:
            raise TimeLimit

    driver = BlockwiseQuantizer(
        blocks,
        layers,
        quantizer,
        device=device,
        dtype=dtype,
        batch_size=text.batch_size,
        offload=offload,
        finished=finished,
    )
    inputs = {"now": time.time()}  # never shared
    parent = Store(arguments.folder / "store").open_or_build(
        "parent", inputs, lambda draft: {"blocks": driver.run(draft, sequences)}
    )
    recorder.results |= {"parent_bytes": parent.bytes, "finished": True}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Arguments of the command line, and overrides of the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the model, the parent and hidden states")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0, help="factor on all sizes of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--offload", choices=("auto", "cuda", "cpu", "file"), default="auto", help="of hidden states")
    parser.add_argument("--seconds", type=float, default=540, help="age of the process after which it stops")
    return parser.parse_known_args()


def main() -> None:
    """Make the model, measure the limits of the device, and quantize."""
    arguments, overrides = parse_arguments()
    model = arguments.folder / f"llama-{arguments.width:g}-{arguments.vocabulary}-{arguments.blocks}"
    config = make_config(model, overrides)
    machine.use_threads(config.runtime.threads)
    machine.tune_malloc()
    device = machine.device(config.runtime.device)
    about = {
        "provenance": provenance(),
        "overrides": overrides,
        "shape": {"blocks": arguments.blocks, "width": arguments.width, "vocabulary": arguments.vocabulary},
        "tokens": config.calibration.sequences * config.calibration.sequence_length,
    }
    recorder = Recorder(arguments.out, device, about)
    if not (model / INDEX).is_file():
        sizes = (arguments.blocks, arguments.width, arguments.vocabulary)
        recorder.timed("make the model", lambda: make(model, *sizes, device=device.type))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    loaded = recorder.timed("open", lambda: open_model(config.model))
    blocks = BlockModel(loaded.model, loaded.checkpoint)
    dtype = compute_dtype(loaded.dtype, device)
    recorder.timed("check", lambda: check_blockwise_forward(blocks, device, dtype))
    recorder.results["limits"] = recorder.timed("rates", lambda: measure_limits(config, blocks, device, dtype))
    with contextlib.suppress(TimeLimit):
        recorder.timed("quantize", lambda: quantize(config, loaded, blocks, recorder, arguments))
    recorder.write()
    print(json.dumps({k: v for k, v in recorder.results.items() if k != "blocks"}, indent=1))


if __name__ == "__main__":
    main()
