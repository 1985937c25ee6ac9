"""Sequential block-wise quantization: each block is calibrated on the outputs of the quantized blocks before it.

Lifecycle of one block:
  1. the block is loaded to the device;
  2. the method quantizes it (``BlockQuantizer.quantize_block``), on the hidden states of every propagated stream;
  3. the block is committed to the draft: after a crash, work continues at the next block;
  4. every stream is run through the block with its own slice of it, which makes the next block's inputs.

Several processes share the calibration sequences; a method may share its numerical work too.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matquant.calibration.activation_streams import ActivationStreams
from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.formats.nested import NestedWeight
from matquant.formats.parent import block_file, read_block, write_block
from matquant.models.activation_cache import OffloadTarget
from matquant.models.blocks import BlockModel
from matquant.quantize.base import BlockContext, BlockQuantizer, dequantize_stream
from matquant.store.distributed_store import DraftLike
from matquant.timing import PhaseTimer


class BlockwiseQuantizer:
    """Quantization of all blocks of one model with one method.

    Args:
        model: blocks of the model.
        layers: layers to quantize of each block, from ``layers_to_quantize``.
        quantizer: the method.
        device, dtype: of the blocks while they run.
        batch_size: calibration sequences of one forward pass.
        solver_device: device of the numerical work; ``device`` if None.
        offload: storage of the hidden states between two blocks; ``device`` if None.
        process_group: processes that share the work; each calls ``run`` with the same arguments.
        progress: called with 1 after each quantized layer.
        finished: called with the record of each block after it is committed and its outputs are made.
    """

    def __init__(
        self,
        model: BlockModel,
        layers: Sequence[Mapping[str, nn.Linear]],
        quantizer: BlockQuantizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 1,
        solver_device: torch.device | None = None,
        offload: OffloadTarget | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        progress: Callable[[int], None] = lambda _: None,
        finished: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.quantizer = quantizer
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.solver_device = solver_device or device
        self.offload = offload
        self.process_group = process_group
        self.progress = progress
        self.finished = finished
        self.timer = PhaseTimer(device)

    def run(self, draft: DraftLike, sequences: Tensor | None) -> list[dict[str, Any]]:
        """Quantize every block into ``draft``.

        Args:
            draft: target of the commits; blocks that it holds already are read from it.
            sequences: int64 [sequences, length], the calibration text; None for a method without calibration.

        Returns:
            Record of each block: file, layers with shapes and errors, notes.
        """
        streams = None if sequences is None else self._start_streams(sequences)
        records = []
        for index in range(len(self.layers)):
            records.append(self._run_block(index, draft, streams))
            self.finished(records[-1])
        return records

    def _start_streams(self, sequences: Tensor) -> ActivationStreams:
        needs = self.quantizer.calibration
        if needs is None:
            raise ValueError(f"{type(self.quantizer).__name__} takes no calibration text")
        with self.timer.timed("prepare"):
            own = sequences[self.process_group.shard_batches(len(sequences), self.batch_size)]
            return ActivationStreams(
                self.model, own, needs.streams, self.batch_size, self.device, self.dtype, self.offload
            )

    def _run_block(self, index: int, draft: DraftLike, streams: ActivationStreams | None) -> dict[str, Any]:
        name = block_file(index)
        committed = draft.has(name)
        last = index + 1 == len(self.layers)
        if committed and (streams is None or last):
            return self._read(draft, name)[1]
        with contextlib.ExitStack() as stack:
            with self.timer.timed("load"):
                # Without calibration no block runs, and only the solver needs the weights.
                place = (self.device, self.dtype) if streams else (self.solver_device, torch.float32)
                stack.enter_context(self.model.on_device(index, *place))
            context = self._context(index, streams)
            if committed:
                weights, record = self._read(draft, name)
            else:
                weights, record = self._quantize(context, draft, name)
            if streams is not None and not last:
                with self.timer.timed("forward"):
                    streams.advance(index, lambda stream: dequantize_stream(stream, weights, context))
        return record

    def _context(self, index: int, streams: ActivationStreams | None) -> BlockContext:
        return BlockContext(
            index=index,
            model=self.model,
            layers=self.layers[index],
            streams=streams,
            device=self.device,
            dtype=self.dtype,
            solver_device=self.solver_device,
            process_group=self.process_group,
            timer=self.timer,
            progress=self.progress,
        )

    def _quantize(
        self, context: BlockContext, draft: DraftLike, name: str
    ) -> tuple[dict[str, NestedWeight], dict[str, Any]]:
        """Quantize a block and commit it."""
        result = self.quantizer.quantize_block(context)
        record = result.record()
        with self.timer.timed("write"):
            write_block(draft, name, result.weights, record)
        return result.weights, record | {"file": name}

    def _read(self, draft: DraftLike, name: str) -> tuple[dict[str, NestedWeight], dict[str, Any]]:
        """Read a committed block."""
        weights, record = read_block(draft, name)
        self.progress(len(weights))
        return weights, record | {"file": name}
