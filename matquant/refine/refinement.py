"""Lifecycle that all refinements share: data, training loop, validation, saved state, and the refined blocks.

A refinement is a subclass of ``Refinement``. Its state is saved at each validation, so that a killed job goes on from there.
"""

import abc
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import Parent, write_block
from matquant.models.blocks import BlockModel
from matquant.refine.block_passes import Trained
from matquant.refine.config import RefineConfig
from matquant.refine.slice_model import SliceModel, open_slice_model
from matquant.refine.slice_reader import LayerFunction
from matquant.store.distributed_store import DraftLike

_STATE_FILE = "training.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RefineContext:
    """Model, parent and text of a refinement.

    Attributes:
        windows: int64 [sequences, length], the training text.
        validation: int64 [sequences, length], held out.
        batch_size: windows of one step, over all processes.
        device, dtype: of the forward passes.
        lambdas: weight of each bit-width in the objective.
        process_group: processes that share the windows of each batch.
        progress: called with 1 after each step.
        validated: called with the step and the validation loss of each bit-width.
    """

    blocks: BlockModel
    parent: Parent
    windows: Tensor
    validation: Tensor
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    lambdas: Mapping[int, float] = dataclasses.field(default_factory=dict)
    process_group: ProcessGroup = SINGLE_PROCESS
    progress: Callable[[int], None] = lambda _: None
    validated: Callable[[int, Mapping[int, float]], None] = lambda _, __: None


class Refinement(abc.ABC):
    """Refinement of one parent into a draft.

    Attributes:
        history: ``step`` and ``kl`` by bit-width, of each validation so far.
        notes: sentences that the user should read, by layer.
        warnings: sentences on the training as a whole.
        linear: layers of a slice, see ``SliceReader``; None: of nested weights whose scales are trained.
        version: part of a refined parent's key; raise it when the same settings give other codes or scales than before.
    """

    version: ClassVar[int] = 1
    linear: LayerFunction | None = None

    def __init__(self, config: RefineConfig, context: RefineContext) -> None:
        self.config, self.context = config, context
        self.history: list[dict[str, Any]] = []
        self.notes: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self._weights = {
            name: weight
            for index in range(len(context.parent.blocks))
            for name, weight in context.parent.block(index).items()
        }

    @abc.abstractmethod
    def start(self, model: SliceModel) -> None:
        """Make the state from which training starts; ``model`` is open for the whole training."""

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Number of steps so far."""

    @abc.abstractmethod
    def take_step(self, model: SliceModel, batch: int) -> None:
        """Take one step on a batch of the training text."""

    @abc.abstractmethod
    def trained(self, bits: int) -> Trained:
        """Tensors by layer that the present slice of ``bits`` bits is made of; they require gradients."""

    @abc.abstractmethod
    def validated(self, losses: Mapping[int, float]) -> None:
        """Receive the validation loss of each bit-width, of the present state."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors on the CPU and JSON-able numbers of the whole state."""

    @abc.abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from a ``state``."""

    @abc.abstractmethod
    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        """Refined weights of all layers, on the CPU."""

    def run(self, draft: DraftLike) -> list[dict[str, Any]]:
        """Train, and write the refined blocks. Returns the record of each block, as in a parent."""
        context = self.context
        rows = context.process_group.shard(context.batch_size)
        own = _own_rows(context.windows, context.batch_size, rows)
        held_out = context.validation[context.process_group.shard(len(context.validation))]
        with (
            _tf32_products(context.device),
            open_slice_model(
                context.blocks,
                self._weights,
                torch.cat([own, held_out]),
                rows.stop - rows.start,
                context.device,
                context.dtype,
                self.linear,
            ) as model,
        ):
            self.start(model)
            self._train(model, len(own), draft)
            if reason := model.graphs_refused:
                self.warnings.append(
                    f"The refinement ran without CUDA graphs, which this model does not allow ({reason}); it took longer."
                )
        self._weights = self.refined(self._weights)
        records = self._write(draft)
        draft.discard(_STATE_FILE)
        return records

    def average(self, gradients: dict[str, Tensor], trained: Trained) -> None:
        """Average the gradients of ``trained`` over the processes, in place; a missing one counts as zeros."""
        group = self.context.process_group
        for name, tensor in trained.items() if group.world_size > 1 else ():
            gradients.setdefault(name, torch.zeros_like(tensor))
            group.all_reduce(gradients[name])
            gradients[name] /= group.world_size

    def _train(self, model: SliceModel, training: int, draft: DraftLike) -> None:
        """Train from the state in the draft, or from the start."""
        batches = [i for i, rows in enumerate(model.inputs.rows) if rows.stop <= training]
        held_out = [i for i, rows in enumerate(model.inputs.rows) if rows.start >= training]
        if draft.has(_STATE_FILE):
            self._load(draft)
        else:
            self._validate(model, held_out)
        self.context.progress(self.step)
        for step in range(self.step, self.config.steps):
            self.take_step(model, batches[_batch_of(step, len(batches), self.config.seed)])
            self.context.progress(1)
            done = step + 1
            if done % self.config.validate_every == 0 or done == self.config.steps:
                self._validate(model, held_out)
                self._save(draft)

    def _validate(self, model: SliceModel, held_out: list[int]) -> None:
        found = self._held_out_losses(model, held_out)
        self.validated(found)
        self.history.append({"step": self.step, "kl": {str(bits): loss for bits, loss in found.items()}})
        self.context.validated(self.step, found)

    @torch.no_grad()
    def _held_out_losses(self, model: SliceModel, held_out: list[int]) -> dict[int, float]:
        """KL of the present slices on the held-out windows of all processes, by bit-width."""
        group, losses = self.context.process_group, torch.zeros(len(self.config.bits), dtype=torch.float64)
        for batch in held_out:
            full, rows = model.hidden(batch), model.inputs.rows[batch]
            for k, bits in enumerate(self.config.bits):
                losses[k] += model.divergence(batch, full, bits, self.trained(bits)) * (rows.stop - rows.start)
        count = torch.tensor(sum(model.inputs.rows[b].stop - model.inputs.rows[b].start for b in held_out)).double()
        group.all_reduce(losses)
        group.all_reduce(count)
        return {bits: float(loss / count) for bits, loss in zip(self.config.bits, losses, strict=True)}

    def _save(self, draft: DraftLike) -> None:
        tensors, numbers = self.state()
        draft.write_tensors(_STATE_FILE, tensors, {"state": json.dumps({"numbers": numbers, "history": self.history})})

    def _load(self, draft: DraftLike) -> None:
        tensors, metadata = draft.read_tensors(_STATE_FILE)
        state = json.loads(metadata["state"])
        self.history = state["history"]
        self.load_state(tensors, state["numbers"])

    def _write(self, draft: DraftLike) -> list[dict[str, Any]]:
        records = []
        for block in self.context.parent.blocks:
            weights = {name: self._weights[name] for name in block["layers"]}
            notes = [sentence for name in weights for sentence in self.notes.get(name, [])]
            block = {**block, "notes": [*block["notes"], *(one for one in notes if one not in block["notes"])]}
            record = {key: value for key, value in block.items() if key != "file"}
            write_block(draft, block["file"], weights, record)
            records.append(block)
        return records


@contextlib.contextmanager
def _tf32_products(device: torch.device) -> Iterator[None]:
    """Let float32 products on a GPU read their factors with 10 bits of mantissa inside the context, as training allows."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _own_rows(windows: Tensor, batch_size: int, rows: slice) -> Tensor:
    """Rows of every whole batch that belong to one process: int64 [batches * rows, length]."""
    whole: Tensor = windows[: len(windows) // batch_size * batch_size].unflatten(0, (-1, batch_size))
    return whole[:, rows].flatten(0, 1)


def _batch_of(step: int, batches: int, seed: int) -> int:
    """Batch of a step: every epoch has an order of its own."""
    epoch, index = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(batches, generator=generator)[index])
