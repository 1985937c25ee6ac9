"""Whole model whose quantized layers read the full-precision weights, or whatever a given forward reads."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from matquant.formats.nested import NestedWeight
from matquant.models.blocks import BlockInputs, BlockModel
from matquant.models.tensor_swap import patched_forwards
from matquant.refine.scaled_linear import scaled_linear

# Output of a layer by its name, from its input [..., in_features] and its bias.
LayerForward = Callable[[str, Tensor, Tensor | None], Tensor]
# Loss of one sequence, summed over its predicted tokens, from its row in the batch and log-probabilities [length - 1,
# vocabulary].
RowLoss = Callable[[int, Tensor], Tensor]


class SliceModel:
    """Forward and backward passes of one batch through blocks and head.

    Activations are recomputed block by block in the backward pass. Construct it with ``open_slice_model``.

    Args:
        blocks: model, on its device.
        weights: nested weights by layer name, on the same device.
        inputs: inputs of block 0, batch by batch.
        windows: int64 [sequences, length], on the same device.
    """

    def __init__(
        self, blocks: BlockModel, weights: Mapping[str, NestedWeight], inputs: BlockInputs, windows: Tensor
    ) -> None:
        self.blocks, self.weights, self.inputs, self.windows = blocks, weights, inputs, windows
        self._forward: LayerForward | None = None  # None: full precision

    def with_scales(self, bits: int, scales: Mapping[str, Tensor]) -> LayerForward:
        """Forward that reads the slice of ``bits`` bits with these scales, float32 [out_features, groups] by layer."""
        return lambda name, x, bias: scaled_linear(x, scales[name], self.weights[name], bits, bias)

    @contextlib.contextmanager
    def reading(self, forward: LayerForward | None) -> Iterator[None]:
        """Compute quantized layers by ``forward`` inside the context; None: by the full-precision weights."""
        before, self._forward = self._forward, forward
        try:
            yield
        finally:
            self._forward = before

    def hidden(self, batch: int) -> Tensor:
        """Hidden states after the last block for one batch: [sequences, length, hidden]."""
        rows = self.inputs.rows[batch]
        hidden = self.inputs.hidden[rows]
        for index, kwargs in enumerate(self.inputs.kwargs[batch]):
            if torch.is_grad_enabled():
                hidden = checkpoint(self.blocks.run_block, index, hidden, kwargs, use_reentrant=False)
            else:
                hidden = self.blocks.run_block(index, hidden, kwargs)
        return hidden

    def divergence(self, batch: int, full: Tensor, backward: bool = False) -> float:
        """Mean KL(full precision || slice) over the predicted tokens of one batch, in nats per token.

        Args:
            full: ``hidden`` of the full-precision model.
            backward: compute the gradients of what the present forward reads.
        """
        return self.mean_loss(batch, self.divergence_from(batch, full, None), backward)

    def mean_loss(self, batch: int, row_loss: RowLoss, backward: bool = False) -> float:
        """Mean of a loss over the predicted tokens of one batch. Logits of one sequence at a time are alive.

        Call it inside ``reading``.

        Args:
            backward: compute the gradients of what the present forward reads.
        """
        with torch.set_grad_enabled(backward):
            output = self.hidden(batch)
        leaf = output.detach().requires_grad_(backward)
        losses = []
        for row, ids in enumerate(self.windows[self.inputs.rows[batch]]):
            with torch.set_grad_enabled(backward):
                found = self._log_probs(ids, leaf[row])
                loss = row_loss(row, found) / (len(output) * len(found))
            if backward:
                loss.backward()  # to the leaf, and to the weight of a quantized head
            losses.append(loss.detach())
        if backward:
            output.backward(leaf.grad)
        return float(torch.stack(losses).sum())

    def divergence_from(self, batch: int, hidden: Tensor, forward: LayerForward | None) -> RowLoss:
        """KL divergence from the model whose layers ``forward`` computes, in nats.

        Args:
            hidden: ``hidden`` of that model for the batch.
        """
        windows = self.windows[self.inputs.rows[batch]]

        def loss(row: int, found: Tensor) -> Tensor:
            with torch.no_grad(), self.reading(forward):
                expected = self._log_probs(windows[row], hidden[row])
            return F.kl_div(found, expected, reduction="sum", log_target=True)

        return loss

    def cross_entropy(self, batch: int) -> RowLoss:
        """Cross-entropy of the text, in nats."""
        windows = self.windows[self.inputs.rows[batch]]
        return lambda row, found: F.nll_loss(found, windows[row, 1:], reduction="sum")

    def _log_probs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next tokens of one sequence: float32 [length - 1, vocabulary]."""
        return self.blocks.head(ids[None], hidden[None])[0, :-1].float().log_softmax(-1)

    def _forward_of(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._forward is None:
                return F.linear(x, layer.weight, layer.bias)
            return self._forward(name, x, layer.bias)

        return forward

    def patched(self) -> Any:
        """Context in which the layers of the model read what ``reading`` says."""
        layers = [self.blocks.model.get_submodule(name) for name in self.weights]
        forwards = [self._forward_of(name, layer) for name, layer in zip(self.weights, layers, strict=True)]
        return patched_forwards(layers, forwards)


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
        model = SliceModel(blocks, on_device, inputs, windows.to(device))
        stack.enter_context(model.patched())
        yield model
