"""Quantizes a model block by block, on what the blocks before it put out.

Several slices of the model may be followed at once, each a stream of hidden states of its own, beside that of the
full-precision model. Lifecycle of one block:
  1. for each stage (layers that share an input: q,k,v / o / gate,up / down), every stream runs up to it, with the layers of
     earlier stages already quantized at the stream's width;
  2. the moments of the stage's inputs give its layers' problems, which are solved;
  3. when all stages are done the block is committed to the draft: after a crash, work goes on at the next block;
  4. every stream runs through the block with its own slice of it, to make the next block's inputs.
Without ``staged`` all layers of a block are one stage, as in GPTQ. ``block`` has the first two steps.

Several processes share the windows of 1. and 4., and of 2. the factorisations (a stream's each) and the rows of every layer.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from matquant.calibration.activation_streams import FULL, ActivationStreams
from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import block_file, read_block, write_block
from matquant.models.activation_cache import OffloadTarget
from matquant.models.blocks import BlockModel
from matquant.quantize.gptq.block_solver import BlockSolver, CalibrationOptions
from matquant.quantize.gptq.solver import SolverOptions
from matquant.store.distributed_store import DraftLike
from matquant.timing import PhaseTimer


def layers_to_quantize(blocks: BlockModel, skips: Callable[[str], bool], *, head: bool) -> list[dict[str, nn.Linear]]:
    """For each block its linear layers by full name but the skipped ones; last the head's, when that is asked for."""
    return [
        {name: layer for name, layer in blocks.linears(index).items() if not skips(name)}
        for index in range(len(blocks) + head)
    ]


def check_layers(layers: Sequence[Mapping[str, nn.Linear]], group_size_of: Callable[[str], int]) -> None:
    """Refuse a group size that does not divide a layer, before any work.

    Raises:
        UserError: names the first such layer, and what would do.
    """
    for block in layers:
        for name, layer in block.items():
            group_size = group_size_of(name)
            if group_size != -1 and layer.in_features % group_size:
                raise UserError(
                    f"method.group_size={group_size} does not divide the {layer.in_features} input features of "
                    f"{name}. Choose another (32, 64, 128, or -1 for one scale per row), or leave such layers alone with "
                    f"method.skip=['*{name.rsplit('.', 1)[-1]}']."
                )
    if not any(layers):
        raise UserError("method.skip leaves no layer to quantize.")


class Driver:
    """Quantizes all blocks of one model with one set of options.

    Args:
        blocks: the model.
        layers: what is quantized of each block, from ``layers_to_quantize``.
        options: of the solver.
        calibration: of the inputs; unused when there is no calibration text.
        device: where blocks run.
        dtype: in which blocks run.
        solver_device: where layers are solved; ``device`` when None.
        place: where hidden states wait between two blocks; ``device`` when None.
        overrides: gives for a layer's name the options that it has of its own, or None.
        process_group: the processes that share the work; each calls ``run`` with the same arguments.
        progress: called with 1 after each solved layer.
        finished: called with what is recorded of each block once it is committed and its outputs are made.
    """

    def __init__(
        self,
        blocks: BlockModel,
        layers: Sequence[Mapping[str, nn.Linear]],
        options: SolverOptions,
        calibration: CalibrationOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        solver_device: torch.device | None = None,
        place: OffloadTarget | None = None,
        overrides: Callable[[str], SolverOptions | None] = lambda _: None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        progress: Callable[[int], None] = lambda _: None,
        finished: Callable[[dict], None] = lambda _: None,
    ) -> None:
        self.blocks = blocks
        self.layers = layers
        self.options = options
        self.calibration = calibration
        self.device = device
        self.solver_device = solver_device or device
        self.dtype = dtype
        self.place = place
        self.overrides = overrides
        self.process_group = process_group
        self.progress = progress
        self.finished = finished
        self.phases = PhaseTimer(device)

    @torch.inference_mode()
    def run(self, draft: DraftLike, windows: Tensor | None) -> list[dict]:
        """Quantize every block into ``draft``.

        Args:
            draft: where blocks are committed; those that it has already are taken from there.
            windows: int64 [sequences, length], the calibration text; None rounds to nearest.

        Returns:
            For each block what ``write_block`` recorded of it: file, layers with shapes and errors, notes.
        """
        streams = None if windows is None else self._start(windows)
        records = []
        for index in range(len(self.layers)):
            records.append(self._block(index, draft, streams))
            self.finished(records[-1])
        return records

    def _start(self, windows: Tensor) -> ActivationStreams:
        names = [FULL] * self.calibration.asymmetric + [str(bits) for bits in self.calibration.streams]
        with self.phases.timed("prepare"):
            batch_size = self.calibration.batch_size
            share = windows[self.process_group.shard_batches(len(windows), batch_size)]
            return ActivationStreams(self.blocks, share, names, batch_size, self.device, self.dtype, self.place)

    def _block(self, index: int, draft: DraftLike, streams: ActivationStreams | None) -> dict:
        name = block_file(index)
        done = draft.has(name)
        if done and (streams is None or index + 1 == len(self.layers)):
            weights, record = read_block(draft, name)
            self.progress(len(weights))
            return record | {"file": name}
        with contextlib.ExitStack() as stack:
            with self.phases.timed("load"):
                # Without calibration nothing runs, and only the solver needs the weights.
                place = (self.device, self.dtype) if streams else (self.solver_device, torch.float32)
                stack.enter_context(self.blocks.on_device(index, *place))
            if done:
                weights, record = read_block(draft, name)
                self.progress(len(weights))
            else:
                weights, record = BlockSolver(self, index, streams).solve()
                with self.phases.timed("write"):
                    write_block(draft, name, weights, record)
            if streams is not None and index + 1 < len(self.layers):
                with self.phases.timed("forward"):
                    streams.advance(index, lambda name: self.decoded(name, weights))
        return record | {"file": name}

    def decoded(self, stream: str, weights: Mapping[str, NestedWeight]) -> dict[str, Tensor]:
        """The dense weights of one stream, on the device; none for the full-precision model, which has its own."""
        if stream == FULL:
            return {}
        return {name: w.to(self.device).dequantize(int(stream), self.dtype) for name, w in weights.items()}
