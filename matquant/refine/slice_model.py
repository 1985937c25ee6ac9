"""KL divergence of the slices of a whole model from its full precision, and the gradients of their scales."""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockInputs, BlockModel
from matquant.refine.block_passes import BlockPasses, GraphedPasses, Passes, Scales
from matquant.refine.slice_reader import SliceReader

LOGIT_BYTES = 2**29  # of the float32 logits of as many sequences as are alive at a time, if more than one

logger = logging.getLogger(__name__)


class SliceModel:
    """Forward and backward passes of one batch through blocks and head. Construct it with ``open_slice_model``.

    Args:
        reader: of the model, on its device.
        inputs: inputs of block 0, batch by batch.
        windows: int64 [sequences, length], on the same device.
    """

    def __init__(self, reader: SliceReader, inputs: BlockInputs, windows: Tensor) -> None:
        self.reader, self.inputs, self.windows = reader, inputs, windows
        self._passes: dict[tuple, Passes] = {}
        self._captures = windows.is_cuda
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @torch.no_grad()
    def hidden(self, batch: int) -> Tensor:
        """Hidden states of the full-precision model after the last block for one batch: [sequences, length, hidden]."""
        hidden = self.inputs.hidden[self.inputs.rows[batch]]
        for index, kwargs in enumerate(self.inputs.kwargs[batch]):
            hidden = self.reader.blocks.run_block(index, hidden, kwargs)
        return hidden

    @torch.no_grad()
    def divergence(self, batch: int, full: Tensor, bits: int, scales: Scales) -> float:
        """Mean KL(full precision || slice) over the predicted tokens of one batch, in nats per token.

        Args:
            full: ``hidden`` of the batch.
            scales: float32 [out_features, groups] of each layer.
        """
        passes = BlockPasses(self.reader, bits, self.inputs.kwargs[batch])
        output = passes.forward(self.inputs.hidden[self.inputs.rows[batch]], scales)
        losses = [self._loss(batch, rows, output, full, bits, scales) for rows in self._parts(output)]
        return float(torch.stack(losses).sum())

    def gradients(self, batch: int, full: Tensor, bits: int, scales: Scales) -> tuple[float, dict[str, Tensor]]:
        """``divergence``, and its gradients by layer for ``scales``, which require gradients.

        An expert without tokens has no gradient.
        """
        hidden = self.inputs.hidden[self.inputs.rows[batch]]
        passes = self._passes_of(batch, bits, hidden, scales)
        output = passes.forward(hidden, scales)
        total = torch.zeros((), device=output.device)
        gradient = torch.empty_like(output)
        found: dict[str, Tensor] = {}
        others = [name for name in self.reader.other_layers if name in scales]
        for rows in self._parts(output):
            part = output[rows].detach().requires_grad_()
            loss = self._loss(batch, rows, part, full, bits, scales)
            gradient[rows], *own = torch.autograd.grad(loss, [part, *(scales[name] for name in others)])
            found = {name: found[name] + one if name in found else one for name, one in zip(others, own, strict=True)}
            total += loss.detach()
        return float(total), passes.backward(gradient) | found

    def _parts(self, hidden: Tensor) -> list[slice]:
        """Sequences whose logits are alive at the same time."""
        sequences, length = hidden.shape[:2]
        step = sequences_at_a_time(length, self.reader.blocks.vocab_size)
        return [slice(first, min(first + step, sequences)) for first in range(0, sequences, step)]

    def _loss(self, batch: int, rows: slice, hidden: Tensor, full: Tensor, bits: int, scales: Scales) -> Tensor:
        """Share of some sequences in the mean divergence of a batch.

        Args:
            rows: of the batch.
            hidden: after the last block, of these sequences or of the whole batch.
        """
        ids = self.windows[self.inputs.rows[batch]]
        mine = hidden if len(hidden) == rows.stop - rows.start else hidden[rows]
        with torch.no_grad():
            expected = self._log_probs(ids[rows], full[rows])
        with self.reader.reading(bits, scales):
            found = self._log_probs(ids[rows], mine)
        tokens = len(ids) * (ids.shape[1] - 1)
        return F.kl_div(found, expected, reduction="sum", log_target=True) / tokens

    def _log_probs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next tokens: float32 [sequences, length - 1, vocabulary]."""
        logits: Tensor = self.reader.blocks.head(ids, hidden)[:, :-1]
        return logits.float().log_softmax(-1)

    def _passes_of(self, batch: int, bits: int, hidden: Tensor, scales: Scales) -> Passes:
        """Passes of a batch: captured ones for all batches of its shape with the same other arguments, where that works."""
        kwargs = self.inputs.kwargs[batch]
        if not self._captures:
            return BlockPasses(self.reader, bits, kwargs)
        leaves = tree_leaves([(one.args, dict(one.kwargs)) for one in kwargs])
        same = tuple(id(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        key = (bits, hidden.shape, same)
        if key not in self._passes:
            try:
                passes = BlockPasses(self.reader, bits, kwargs)
                self._passes[key] = GraphedPasses(passes, hidden, scales, self._pool)
            except RuntimeError as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                logger.warning("Training runs without CUDA graphs, which this model does not allow (%s).", reason)
                self._captures = False
                return BlockPasses(self.reader, bits, kwargs)
        return self._passes[key]


def sequences_at_a_time(length: int, vocabulary: int) -> int:
    """Sequences whose float32 logits take at most ``LOGIT_BYTES``; at least one."""
    return max(1, LOGIT_BYTES // (4 * length * vocabulary))


@contextlib.contextmanager
def open_slice_model(
    blocks: BlockModel,
    weights: Mapping[str, NestedWeight],
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[SliceModel]:
    """Put the whole model on ``device`` in ``dtype`` while the context is open.

    Args:
        weights: nested weights by layer name; copied to the device.
        windows: int64 [sequences, length].
    """
    inputs = blocks.capture_block_inputs(windows, batch_size, device, dtype)
    on_device = {name: weight.to(device) for name, weight in weights.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocks.head_on_device(device, dtype))
        for index in range(len(blocks)):
            stack.enter_context(blocks.on_device(index, device, dtype))
        reader = SliceReader(blocks, on_device)
        stack.enter_context(reader.patched())
        yield SliceModel(reader, inputs, windows.to(device))
