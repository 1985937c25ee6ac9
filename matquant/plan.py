"""What a job needs before it starts: memory by device, room on the disk, and about how long it takes.

The sums are over what is alive at the same time at the worst moment of each phase: while the first inputs are embedded, while
a block's inputs are gathered and its layers solved, and while slices are measured. None of them grows with the number of
blocks but the hidden states' place on the disk and the parent's size. Only what generates text holds the whole model.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from matquant import machine
from matquant.calibration.hessian import PANEL
from matquant.errors import UserError
from matquant.evaluate.metrics import PIECE
from matquant.evaluate.slices import LOGITS_AT_ONCE
from matquant.models.activation_cache import OffloadTarget
from matquant.models.model_sizes import Layer, ModelSizes
from matquant.quantize.gptq.block_solver import MOST_MOMENTS
from matquant.quantize.gptq.solver import MOST_WEIGHTS

_FLOAT = 4  # bytes of a float32
_GB = 1e9

# Square matrices alive in a factorisation: the damped Hessian, its factor, the inverse and the factor of that.
_FACTORING = 4

# Arrays of a matrix's size while its codes are decoded: indices, values, and what is made of them.
_DECODING = 4

# Arrays of a piece of logits that are alive while two models' are compared.
_COMPARING = 9

# Side of the matrices whose product tells the speed of a device.
_PROBE = 1024


Stage = Literal["quantize", "evaluate", "generate"]

# What helps a stage that needs too much memory of the GPU, or of the host.
_MENDS: dict[Stage, tuple[str, str]] = {
    "quantize": (
        "Follow fewer method.streams, lower calibration.batch_size and eval batch sizes, or use runtime.device=cpu.",
        "Follow fewer method.streams, set method.asymmetric=false, lower batch sizes or the number of calibration.sequences, "
        "or leave the widest layers alone with method.skip.",
    ),
    "evaluate": (
        "Lower the batch_size of eval.datasets, or use runtime.device=cpu.",
        "Lower the batch_size or the number of sequences of eval.datasets, or measure fewer bits at once.",
    ),
    "generate": (
        "Generating holds the whole model. Ask for lower bits, whose planes alone are kept, or use runtime.device=cpu.",
        "Generating holds the whole model. Ask for lower bits, whose planes alone are kept, or use a GPU that has the room.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibrating:
    """How a parent is made: tokens in all and in one batch, streams beside the full-precision one, widths, and so on.

    No streams stand for rounding to nearest, which looks at no inputs.
    """

    tokens: int
    batch: int
    streams: int
    widths: int
    asymmetric: bool
    staged: bool
    group_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes of memory at a stage's worst moment: on the device (0 when that is the CPU) and of the host; and on the disk."""

    stage: Stage
    device: int
    host: int
    disk: int


def quantizing(
    shapes: ModelSizes, job: Calibrating, *, on_gpu: bool, solver_on_gpu: bool, place: OffloadTarget
) -> Need:
    """The need of making one parent; ``place`` is where hidden states wait."""
    stages = _stages(shapes, job)
    waiting = (job.streams + job.asymmetric) * job.tokens * shapes.hidden * shapes.computing
    copy = shapes.block * shapes.computing
    gathering = max((_gathering(shapes, job, stage) for stage in stages), default=0)
    solving = max((_solving(job, stage) for stage in stages), default=0)
    parent = _parent_bytes(shapes, job.group_size)
    writing = 3 * parent // max(1, shapes.blocks)
    disk = parent + (waiting if isinstance(place, Path) else 0)
    loading = max(_loading(shapes, shapes.embeddings), _loading(shapes, shapes.block))
    if not on_gpu:
        running = max(loading, copy + max(gathering, solving, writing))
        return _split("quantize", running, waiting, 0, disk, on_gpu=False, place=place)
    running = max(loading, copy + max(gathering, solving if solver_on_gpu else 0))
    on_host = max(writing, 0 if solver_on_gpu else solving)
    return _split("quantize", running, waiting, on_host, disk, on_gpu=True, place=place)


def measuring(
    shapes: ModelSizes, tokens: int, length: int, batch: int, variants: int, *, on_gpu: bool, place: OffloadTarget
) -> Need:
    """The need of measuring so many variants in one pass over the blocks."""
    waiting = (1 + variants) * tokens * shapes.hidden * shapes.computing
    sizes = [layer.rows * layer.columns for layer in shapes.layers]
    # The decoded layers of one variant, the temporaries of one, and its codes, which are mapped from the parent and stay so.
    variant = sum(sizes) * _FLOAT + 3 * max(sizes, default=0) * _FLOAT + sum(sizes)
    lent, codes = sum(sizes) * shapes.computing, 0 if on_gpu else sum(sizes)
    passing = lent + codes + _activations(shapes, batch * length)
    block = shapes.block * shapes.computing + max(0 if on_gpu else variant, passing)
    rows = max(1, min(batch, LOGITS_AT_ONCE // (length * shapes.vocabulary)))
    logits = rows * length * shapes.vocabulary
    comparing = _COMPARING * min(PIECE["other" if on_gpu else "cpu"], logits) * _FLOAT
    head = shapes.head * shapes.computing + 2 * logits * shapes.computing + comparing + codes
    loading = max(_loading(shapes, part) for part in (shapes.embeddings, shapes.block, shapes.head))
    running = max(loading, block, head)
    disk = waiting if isinstance(place, Path) else 0
    return _split("evaluate", running, waiting, variant, disk, on_gpu=on_gpu, place=place)


def generating(shapes: ModelSizes, planes: int, group_size: int, prompt: int, new: int, *, on_gpu: bool) -> Need:
    """The need of going on with a prompt.

    All that is not quantized is held as it is computed with, and so many planes of the codes with their scales. To that come
    keys and values of every token, no more than two hidden states in each block, and the prompt's way through a block. While
    a parent's block is packed, its codes are mapped.
    """
    dense = (shapes.parameters - shapes.quantized) * shapes.computing
    packed = shapes.quantized * planes // 8 + _scale_bytes(shapes, group_size)
    cache = 2 * shapes.blocks * (prompt + new) * shapes.hidden * shapes.computing
    held = dense + packed + cache + _activations(shapes, prompt)
    mapped = _parent_bytes(shapes, group_size) // max(1, shapes.blocks)
    reading = _loading(
        shapes, max(shapes.embeddings, shapes.block - sum(one.rows * one.columns for one in shapes.layers))
    )
    if on_gpu:
        return Need(stage="generate", device=held, host=max(2 * mapped, reading), disk=0)
    return Need(stage="generate", device=0, host=held + mapped, disk=0)


def _split(
    stage: Stage, running: int, waiting: int, on_host: int, disk: int, *, on_gpu: bool, place: OffloadTarget
) -> Need:
    if not on_gpu:
        return Need(stage=stage, device=0, host=running + (0 if isinstance(place, Path) else waiting), disk=disk)
    there = isinstance(place, torch.device) and place.type == "cuda"
    host = on_host + (waiting if isinstance(place, torch.device) and not there else 0)
    return Need(stage=stage, device=running + (waiting if there else 0), host=host, disk=disk)


def _loading(shapes: ModelSizes, parameters: int) -> int:
    """Tensors are mapped from their file, and copied when they are computed with in another dtype than they are stored in."""
    return parameters * (shapes.computing + (shapes.stored if shapes.stored != shapes.computing else 0))


def _activations(shapes: ModelSizes, tokens: int) -> int:
    """The widest intermediate results of a block for one batch, a few of which are alive together."""
    widest = max((max(layer.rows, layer.columns) for layer in shapes.layers), default=shapes.hidden)
    return 4 * tokens * widest * shapes.computing


def _stages(shapes: ModelSizes, job: Calibrating) -> list[list[Layer]]:
    """Layers whose inputs are gathered in one pass."""
    if not job.staged:
        return [list(shapes.layers)]
    stages = dict.fromkeys(layer.stage for layer in shapes.layers)
    return [[layer for layer in shapes.layers if layer.stage == number] for number in stages]


def _inputs(stage: Sequence[Layer]) -> list[int]:
    """The columns of each different input of a stage."""
    return list({layer.input: layer.columns for layer in stage}.values())


def _gathering(shapes: ModelSizes, job: Calibrating, stage: Sequence[Layer]) -> int:
    """A stage's moments, what was caught of a batch in each stream, each stream's layers of earlier stages, and what is there
    for a moment: the batch's way through the block, or a product that is added to the moments."""
    if not job.streams:
        return 0
    before = sum(layer.rows * layer.columns for layer in shapes.layers if layer.stage < min(one.stage for one in stage))
    decoded = job.streams * before * shapes.computing if job.staged else 0
    widest = max(_inputs(stage))
    product = widest * (widest if job.asymmetric else min(widest, PANEL)) * _FLOAT
    caught = (job.streams + job.asymmetric) * job.batch * sum(_inputs(stage)) * shapes.computing
    difference = job.asymmetric * job.batch * max(_inputs(stage)) * _FLOAT
    passing = max(_activations(shapes, job.batch), difference + product)
    return _moments(job, _inputs(stage)) + decoded + caught + passing


def _moments(job: Calibrating, inputs: Sequence[int]) -> int:
    """Sums in float64 for each stream, of squares and for asymmetric calibration of products."""
    each = [job.streams * (1 + job.asymmetric) * columns**2 * 2 * _FLOAT for columns in inputs]
    return min(sum(each), max(MOST_MOMENTS, *each)) if each else 0


def _solving(job: Calibrating, stage: Sequence[Layer]) -> int:
    """What is alive while the layers of a stage are solved, of which those with the widest input need most."""
    inputs = _inputs(stage)
    n = max(inputs)
    weights = max(layer.rows * layer.columns for layer in stage if layer.columns == n)
    part = min(weights, MOST_WEIGHTS)
    # Of each width its targets and, without calibration, nothing else; else their start, if it is shifted, and gradients.
    arrays = job.widths * (2 + job.asymmetric if job.streams else 1) + _DECODING
    solver = (weights + arrays * part) * _FLOAT
    if not job.streams:
        return solver
    others = list(inputs)
    others.remove(n)
    square = n * n * _FLOAT
    given = job.streams * (1 + job.asymmetric) * square
    made = job.streams * (2 + job.asymmetric) * square  # damped Hessian, factor, shift
    # The last stream's are only being made while its Hessian is factored.
    factoring = made + (_FACTORING - 2 - job.asymmetric) * square
    return _moments(job, others) + given + max(factoring, made + solver)


def _parent_bytes(shapes: ModelSizes, group_size: int) -> int:
    return shapes.quantized + _scale_bytes(shapes, group_size)


def _scale_bytes(shapes: ModelSizes, group_size: int) -> int:
    return 2 * (shapes.quantized // group_size) if group_size > 0 else 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A job's need beside what there is, all in bytes; peaks of the host hold what the process has already.

    Attributes:
        worst_on_host, worst_on_device: the stages of the peaks.
        place: where hidden states wait between blocks; None when none do.
        seconds: a rough estimate from a quick probe of the device.
    """

    parameters: int
    checkpoint: int
    parent: int
    host_peak: int
    host_free: int
    worst_on_host: Stage
    device_peak: int
    device_free: int
    worst_on_device: Stage
    disk: int
    disk_free: int
    place: str | None
    seconds: float

    def sentence(self) -> str:
        """For the terminal."""
        gpu = f", {self.device_peak / _GB:.2f} GB of GPU memory" if self.device_peak else ""
        waiting = f" hidden states in {self.place};" if self.place else ""
        return (
            f"plan: {self.parameters / 1e6:,.1f} M parameters ({self.checkpoint / _GB:.2f} GB); peak "
            f"{self.host_peak / _GB:.2f} GB of memory{gpu}; {self.disk / _GB:.2f} GB of disk;{waiting} "
            f"about {_duration(self.seconds)}"
        )

    def refuse(self) -> None:
        """Raises UserError when the job cannot fit, with what would help."""
        for what, needed, free, mend in (
            ("GPU memory", self.device_peak, self.device_free, _MENDS[self.worst_on_device][0]),
            ("memory", self.host_peak, self.host_free, _MENDS[self.worst_on_host][1]),
            (
                "room on the disk of store.path",
                self.disk,
                self.disk_free,
                "Make room, or set store.path to another disk.",
            ),
        ):
            if needed > free:
                raise UserError(
                    f"This job needs about {needed / _GB:.2f} GB of {what}, but there are {free / _GB:.2f} GB. {mend} "
                    "runtime.check_memory=false starts it nevertheless."
                )


def make_plan(
    shapes: ModelSizes,
    needs: Sequence[Need],
    operations: float,
    *,
    device: torch.device,
    place: OffloadTarget | None,
    store: Path,
    group_size: int,
) -> Plan:
    """The worst of several needs, one after the other, beside what this machine has.

    Args:
        needs: of the job's stages.
        operations: multiplications and additions of all stages.
        place: where hidden states wait; None when none do.
    """
    now = psutil.Process().memory_info().rss
    on_gpu = device.type == "cuda"
    on_host, on_device = (max(needs, key=lambda need: getattr(need, where)) for where in ("host", "device"))
    return Plan(
        parameters=shapes.parameters,
        checkpoint=shapes.parameters * shapes.stored,
        parent=_parent_bytes(shapes, group_size),
        host_peak=max(machine.host_peak(), now + on_host.host),
        host_free=now + machine.host_free(),
        worst_on_host=on_host.stage,
        device_peak=on_device.device,
        device_free=machine.device_free(device) if on_gpu else 0,
        worst_on_device=on_device.stage,
        disk=max(need.disk for need in needs),
        disk_free=machine.disk_free(store),
        place=_place_name(place),
        seconds=operations / _speed(device),
    )


def _place_name(place: OffloadTarget | None) -> str | None:
    if place is None:
        return None
    return "a file" if isinstance(place, Path) else "GPU memory" if place.type == "cuda" else "memory"


def operations(shapes: ModelSizes, job: Calibrating | None, tokens: int, variants: int) -> float:
    """Multiplications and additions of making a parent (if ``job``) and of measuring; the solver's by a rule of thumb."""
    passes = 2.0 * shapes.block * shapes.blocks
    total = passes * tokens * (1 + variants) + 2.0 * shapes.head * tokens * (1 + variants)
    if job is not None:
        stages = len(_stages(shapes, job))
        streams = job.streams + job.asymmetric
        # A stage runs the block about half way on average, and one pass makes the next block's inputs.
        total += passes * job.tokens * streams * (1 + stages / 2)
        for n in (n for stage in _stages(shapes, job) for n in _inputs(stage)):
            gathering = 2.0 * job.tokens * n * n * job.streams * (1 + job.asymmetric)
            total += shapes.blocks * (gathering + 4.0 * n**3 * job.streams)
        # Feedback and two sweeps are a few products with a Hessian; choosing codes costs about 2000 operations a weight.
        for layer in shapes.layers:
            total += shapes.blocks * job.widths * layer.rows * layer.columns * (8.0 * layer.columns + 2000)
    return total


def _speed(device: torch.device) -> float:
    """Operations a second of a float32 matrix product."""
    matrix = torch.randn(_PROBE, _PROBE, device=device)
    matrix @ matrix
    start = time.perf_counter()
    (matrix @ matrix).sum().item()
    return 2.0 * _PROBE**3 / max(time.perf_counter() - start, 1e-6)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
