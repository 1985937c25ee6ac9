"""Losses of the slices of a whole model, and the gradients of the tensors that they are made of."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockInputs, BlockModel
from matquant.refine.block_passes import BlockPasses, GraphedPasses, Passes, Trained
from matquant.refine.slice_reader import LayerFunction, SliceReader

LOGIT_BYTES = 2**29  # of the float32 logits of as many sequences as are alive at a time, if more than one

# Loss summed over the predicted tokens of some sequences of a batch, of float32 log-probabilities [sequences, length - 1,
# vocabulary].
Loss = Callable[[slice, Tensor], Tensor]

logger = logging.getLogger(__name__)


class SliceModel:
    """Forward and backward passes of one batch through blocks and head. Construct it with ``open_slice_model``.

    Args:
        reader: of the model, on its device.
        inputs: inputs of block 0, batch by batch.
        windows: int64 [sequences, length], on the same device.
        graphs: capture the passes as CUDA graphs on a GPU, which copy the trained tensors.

    Attributes:
        graphs_refused: why passes that should be captured are not; empty if they are, or should not be.
    """

    def __init__(self, reader: SliceReader, inputs: BlockInputs, windows: Tensor, graphs: bool = True) -> None:
        self.reader, self.inputs, self.windows = reader, inputs, windows
        self._passes: dict[tuple[object, ...], Passes] = {}
        self._captures = graphs and windows.is_cuda
        self.graphs_refused = ""
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @torch.no_grad()
    def hidden(self, batch: int) -> Tensor:
        """Hidden states of the full-precision model after the last block for one batch: [sequences, length, hidden]."""
        hidden = self.inputs.hidden[self.inputs.rows[batch]]
        for index, kwargs in enumerate(self.inputs.kwargs[batch]):
            hidden = self.reader.blocks.run_block(index, hidden, kwargs)
        return hidden

    @torch.no_grad()
    def divergence(self, batch: int, full: Tensor, bits: int, trained: Trained) -> float:
        """Mean KL(full precision || slice) over the predicted tokens of one batch, in nats per token.

        Args:
            full: ``hidden`` of the batch.
            trained: tensors that the slice of ``bits`` bits is made of.
        """
        output, loss = self.slice_hidden(batch, bits, trained), self.divergence_from(batch, full)
        losses = [self._share(batch, rows, output[rows], loss, bits, trained) for rows in self._parts(output)]
        return float(torch.stack(losses).sum())

    @torch.no_grad()
    def slice_hidden(self, batch: int, bits: int, trained: Trained) -> Tensor:
        """Hidden states of a slice after the last block for one batch: [sequences, length, hidden]."""
        passes = BlockPasses(self.reader, bits, self.inputs.kwargs[batch])
        return passes.forward(self.inputs.hidden[self.inputs.rows[batch]], trained)

    def divergence_from(self, batch: int, hidden: Tensor, read: tuple[int, Trained] | None = None) -> Loss:
        """KL divergence from another model, in nats.

        Args:
            hidden: of that model after the last block, for the batch.
            read: bit-width and tensors of that model's slice; None: the full-precision model.
        """

        @torch.no_grad()
        def expected(rows: slice) -> Tensor:
            with self.reader.reading(*read) if read else contextlib.nullcontext():
                return self._log_probs(self._ids(batch)[rows], hidden[rows])

        return lambda rows, found: F.kl_div(found, expected(rows), reduction="sum", log_target=True)

    def cross_entropy(self, batch: int) -> Loss:
        """Cross-entropy of the text, in nats."""
        ids = self._ids(batch)
        return lambda rows, found: F.nll_loss(found.flatten(0, 1), ids[rows, 1:].flatten(), reduction="sum")

    def gradients(self, batch: int, full: Tensor, bits: int, trained: Trained) -> tuple[float, dict[str, Tensor]]:
        """``divergence``, and its gradients by layer for ``trained``, which require gradients."""
        return self.loss_and_gradients(batch, self.divergence_from(batch, full), bits, trained)

    def loss_and_gradients(
        self, batch: int, loss: Loss, bits: int, trained: Trained
    ) -> tuple[float, dict[str, Tensor]]:
        """Mean of a loss over the predicted tokens of one batch, and its gradients by layer for ``trained``.

        An expert without tokens has no gradient.
        """
        hidden = self.inputs.hidden[self.inputs.rows[batch]]
        passes = self._passes_of(batch, bits, hidden, trained)
        output = passes.forward(hidden, trained)
        total = torch.zeros((), device=output.device)
        gradient = torch.empty_like(output)
        found: dict[str, Tensor] = {}
        others = [name for name in self.reader.other_layers if name in trained]
        for rows in self._parts(output):
            part = output[rows].detach().requires_grad_()
            share = self._share(batch, rows, part, loss, bits, trained)
            gradient[rows], *own = torch.autograd.grad(share, [part, *(trained[name] for name in others)])
            found = {name: found[name] + one if name in found else one for name, one in zip(others, own, strict=True)}
            total += share.detach()
        return float(total), passes.backward(gradient) | found

    def _parts(self, hidden: Tensor) -> list[slice]:
        """Sequences whose logits are alive at the same time."""
        sequences, length = hidden.shape[:2]
        step = sequences_at_a_time(length, self.reader.blocks.vocab_size)
        return [slice(first, min(first + step, sequences)) for first in range(0, sequences, step)]

    def _share(self, batch: int, rows: slice, hidden: Tensor, loss: Loss, bits: int, trained: Trained) -> Tensor:
        """Share of some sequences in the mean loss of a batch.

        Args:
            rows: of the batch.
            hidden: after the last block, of these sequences.
        """
        ids = self._ids(batch)
        with self.reader.reading(bits, trained):
            found = self._log_probs(ids[rows], hidden)
        return loss(rows, found) / (len(ids) * (ids.shape[1] - 1))

    def _ids(self, batch: int) -> Tensor:
        """Tokens of a batch: int64 [sequences, length]."""
        return self.windows[self.inputs.rows[batch]]

    def _log_probs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next tokens: float32 [sequences, length - 1, vocabulary]."""
        logits: Tensor = self.reader.blocks.head(ids, hidden)[:, :-1]
        return logits.float().log_softmax(-1)

    def _passes_of(self, batch: int, bits: int, hidden: Tensor, trained: Trained) -> Passes:
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
                self._passes[key] = GraphedPasses(passes, hidden, trained, self._pool)
            except RuntimeError as error:
                self._captures, self.graphs_refused = False, (str(error) or type(error).__name__).splitlines()[0]
                logger.warning("Training runs without CUDA graphs (%s) and takes longer.", self.graphs_refused)
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
    linear: LayerFunction | None = None,
) -> Iterator[SliceModel]:
    """Put the whole model on ``device`` in ``dtype`` while the context is open.

    Args:
        weights: nested weights by layer name; copied to the device.
        windows: int64 [sequences, length].
        linear: layers of a slice, see ``SliceReader``; passes of other layers than the default are not captured as graphs.
    """
    inputs = blocks.capture_block_inputs(windows, batch_size, device, dtype)
    on_device = {name: weight.to(device) for name, weight in weights.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocks.head_on_device(device, dtype))
        for index in range(len(blocks)):
            stack.enter_context(blocks.on_device(index, device, dtype))
        reader = SliceReader(blocks, on_device, linear)
        stack.enter_context(reader.patched())
        yield SliceModel(reader, inputs, windows.to(device), graphs=linear is None)
