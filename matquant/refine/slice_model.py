"""Whole model whose quantized layers read the full-precision weights, or a slice with scales that are given."""

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
        self._read: tuple[int, Mapping[str, Tensor]] | None = None  # bit-width and scales; None: full precision

    @contextlib.contextmanager
    def reading(self, bits: int, scales: Mapping[str, Tensor]) -> Iterator[None]:
        """Read the slice of ``bits`` bits with these scales, float32 [out_features, groups] by layer, inside the context."""
        self._read = bits, scales
        try:
            yield
        finally:
            self._read = None

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

        Call it inside ``reading``. Logits of one sequence at a time are alive.

        Args:
            full: ``hidden`` of the full-precision model.
            backward: compute the gradients of the scales.
        """
        rows = self.inputs.rows[batch]
        with torch.set_grad_enabled(backward):
            output = self.hidden(batch)
        leaf = output.detach().requires_grad_(backward)
        losses = []
        for row, ids in enumerate(self.windows[rows]):
            expected = self._log_probs(ids, full[row], as_full=True)
            with torch.set_grad_enabled(backward):
                found = self._log_probs(ids, leaf[row])
                loss = F.kl_div(found, expected, reduction="sum", log_target=True) / (len(output) * len(expected))
            if backward:
                loss.backward()  # to the leaf, and to the scales of a quantized head
            losses.append(loss.detach())
        if backward:
            output.backward(leaf.grad)
        return float(torch.stack(losses).sum())

    def _log_probs(self, ids: Tensor, hidden: Tensor, as_full: bool = False) -> Tensor:
        """Log-probabilities of the next tokens of one sequence: float32 [length - 1, vocabulary]."""
        kept = self._read
        self._read = None if as_full else kept
        with torch.set_grad_enabled(torch.is_grad_enabled() and not as_full):
            logits = self.blocks.head(ids[None], hidden[None])[0, :-1]
        self._read = kept
        return logits.float().log_softmax(-1)

    def _forward_of(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = self.weights[name]

        def forward(x: Tensor) -> Tensor:
            if self._read is None:
                return F.linear(x, layer.weight, layer.bias)
            bits, scales = self._read
            return scaled_linear(x, scales[name], weight, bits, layer.bias)

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
