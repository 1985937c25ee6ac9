"""Training of the scales of some bit-widths, with the full-precision model as the teacher.

One step draws a batch, runs the full-precision model on it once, and takes an optimizer step at every bit-width. Bit-widths
share nothing that is trained, so each keeps its own best state, judged on held-out windows: none ends worse than it began.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.formats.parent import Parent, write_block
from matquant.models.blocks import BlockModel
from matquant.refine.config import RefineConfig
from matquant.refine.slice_model import SliceModel, open_slice_model
from matquant.refine.trained_scales import TrainedScales
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
    process_group: ProcessGroup = SINGLE_PROCESS
    progress: Callable[[int], None] = lambda _: None
    validated: Callable[[int, Mapping[int, float]], None] = lambda _, __: None


class ScaleRefinement:
    """Refinement of one parent into a draft.

    Attributes:
        history: ``step`` and ``kl`` by bit-width, of each validation so far.
    """

    def __init__(self, config: RefineConfig, context: RefineContext) -> None:
        self.config, self.context = config, context
        self.history: list[dict[str, Any]] = []
        self._weights = {
            name: weight
            for index in range(len(context.parent.blocks))
            for name, weight in context.parent.block(index).items()
        }

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
            ) as model,
        ):
            trained = [TrainedScales(bits, model.reader.weights, self.config) for bits in self.config.bits]
            self._train(model, trained, len(own), draft)
        for one in trained:
            self._weights = one.refined(self._weights)
        records = self._write(draft)
        draft.discard(_STATE_FILE)
        return records

    def _train(self, model: SliceModel, trained: list[TrainedScales], training: int, draft: DraftLike) -> None:
        """Train from the state in the draft, or from the start."""
        batches = [i for i, rows in enumerate(model.inputs.rows) if rows.stop <= training]
        held_out = [i for i, rows in enumerate(model.inputs.rows) if rows.start >= training]
        if draft.has(_STATE_FILE):
            self._load(trained, draft)
        else:
            self._validate(model, trained, held_out)
        self.context.progress(trained[0].step)
        for step in range(trained[0].step, self.config.steps):
            batch = batches[_batch_of(step, len(batches), self.config.seed)]
            full = model.hidden(batch)
            for one in trained:
                self._descend(model, one, batch, full)
            self.context.progress(1)
            done = step + 1
            if done % self.config.validate_every == 0 or done == self.config.steps:
                self._validate(model, trained, held_out)
                self._save(trained, draft)

    def _descend(self, model: SliceModel, one: TrainedScales, batch: int, full: Tensor) -> None:
        """Take one optimizer step; processes average their gradients."""
        group, scales = self.context.process_group, one.scales()
        value, gradients = model.gradients(batch, full, one.bits, scales)
        loss = torch.tensor(value, dtype=torch.float64)
        group.all_reduce(loss)
        if group.world_size > 1:
            for name, tensor in scales.items():
                gradients.setdefault(name, torch.zeros_like(tensor))
                group.all_reduce(gradients[name])
                gradients[name] /= group.world_size
        one.take_step(gradients, float(loss) / group.world_size)

    @torch.no_grad()
    def _validate(self, model: SliceModel, trained: list[TrainedScales], held_out: list[int]) -> None:
        group, losses = self.context.process_group, torch.zeros(len(trained), dtype=torch.float64)
        for batch in held_out:
            full, rows = model.hidden(batch), model.inputs.rows[batch]
            for k, one in enumerate(trained):
                losses[k] += model.divergence(batch, full, one.bits, one.scales()) * (rows.stop - rows.start)
        count = torch.tensor(sum(model.inputs.rows[b].stop - model.inputs.rows[b].start for b in held_out)).double()
        group.all_reduce(losses)
        group.all_reduce(count)
        found = {one.bits: float(loss / count) for one, loss in zip(trained, losses, strict=True)}
        for one in trained:
            one.keep_if_best(found[one.bits])
        self.history.append({"step": trained[0].step, "kl": {str(bits): loss for bits, loss in found.items()}})
        self.context.validated(trained[0].step, found)

    def _save(self, trained: list[TrainedScales], draft: DraftLike) -> None:
        tensors: dict[str, Tensor] = {}
        numbers = {}
        for one in trained:
            own, numbers[str(one.bits)] = one.state()
            tensors |= own
        draft.write_tensors(_STATE_FILE, tensors, {"state": json.dumps({"numbers": numbers, "history": self.history})})

    def _load(self, trained: list[TrainedScales], draft: DraftLike) -> None:
        tensors, metadata = draft.read_tensors(_STATE_FILE)
        state = json.loads(metadata["state"])
        self.history = state["history"]
        for one in trained:
            one.load_state(tensors, state["numbers"][str(one.bits)])

    def _write(self, draft: DraftLike) -> list[dict[str, Any]]:
        records = []
        for block in self.context.parent.blocks:
            weights = {name: self._weights[name] for name in block["layers"]}
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
    whole = windows[: len(windows) // batch_size * batch_size].unflatten(0, (-1, batch_size))
    return whole[:, rows].flatten(0, 1)


def _batch_of(step: int, batches: int, seed: int) -> int:
    """Batch of a step: every epoch has an order of its own."""
    epoch, index = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(batches, generator=generator)[index])
