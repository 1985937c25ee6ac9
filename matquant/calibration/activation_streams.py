"""Hidden states of the calibration sequences on their way through the blocks, in the full-precision model and in its slices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from matquant.models.activation_cache import OffloadTarget
from matquant.models.blocks import BlockModel

Weights = Mapping[str, Tensor]  # replacement weights of linear layers of a block, by full name

FULL = "full"


class ActivationStreams:
    """Hidden states of the calibration sequences in front of one block after the other, one stream per model.

    A block has to be on the device (``BlockModel.on_device``) while it is run.

    Args:
        blocks: the model.
        windows: int64 [sequences, length].
        names: of the streams: ``full``, or a bit-width.
        batch_size: sequences of one forward pass; has no effect but on speed and memory.
        device, dtype: of the blocks.
        place: storage of the hidden states between two blocks; ``device`` if None.
    """

    def __init__(
        self,
        blocks: BlockModel,
        windows: Tensor,
        names: Sequence[str],
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        place: OffloadTarget | None = None,
    ) -> None:
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self._ids = windows
        self._windows = blocks.capture_block_inputs(windows, batch_size, device, dtype, place)
        # All models have the same embeddings, so the streams differ from the first block's output on.
        self.hidden = {
            name: self._windows.hidden.clone() if i else self._windows.hidden for i, name in enumerate(names)
        }

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._windows.rows)

    def block_inputs(self, name: str, batch: int) -> Tensor:
        """Hidden states in front of the current block: [batch, length, hidden] of one stream, on the device."""
        return self.hidden[name][self._windows.rows[batch]]

    @torch.no_grad()
    def layer_inputs(
        self, index: int, layers: Sequence[nn.Linear], weights: Mapping[str, Weights]
    ) -> Iterator[dict[str, list[Tensor | None]]]:
        """Yield the inputs of some layers of block ``index`` batch by batch; the head is the block after the last.

        The forward pass of the block stops when all inputs are captured.

        Args:
            layers: linear layers of the block.
            weights: replacement weights of each stream, see ``BlockModel.with_weights``.

        Yields:
            For each stream the input of each layer, [tokens, in_features], or None if it was not called.
        """
        for batch in range(self.batches):
            found = {}
            for name in self.hidden:
                # The exception must not reach a generator-based context manager. From Python 3.12 on that would be part of its
                # traceback: a reference cycle that keeps all tensors of the forward pass.
                swapped = self.blocks.with_weights(index, weights.get(name, {}))
                with swapped, _capture_inputs(layers) as captured, suppress(_AllCaptured):
                    self.run(index, batch, self.block_inputs(name, batch))
                found[name] = [captured.get(layer) for layer in layers]
            yield found

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Output of block ``index`` (logits for the head) for hidden states [batch, length, hidden] of a batch."""
        if index == len(self.blocks):
            return self.blocks.head(self._ids[self._windows.rows[batch]].to(self.device), hidden)
        return self.blocks.run_block(index, hidden, self._windows.kwargs[batch][index])

    @torch.no_grad()
    def advance(self, index: int, weights_of: Callable[[str], Weights]) -> None:
        """Replace the hidden states of each stream by the output of block ``index`` with the stream's weights.

        Args:
            weights_of: returns the weights of one stream; called stream by stream, so that one set is in memory at a time.
        """
        for name, hidden in self.hidden.items():
            with self.blocks.with_weights(index, weights_of(name)):
                for batch, rows in enumerate(self._windows.rows):
                    hidden[rows] = self.run(index, batch, hidden[rows])


class _AllCaptured(Exception):
    """End of a block's forward pass, once all inputs are captured."""


@contextmanager
def _capture_inputs(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Capture the first input of each layer; raise _AllCaptured in the forward pass when there is one of each."""
    captured: dict[nn.Module, Tensor] = {}

    def capture(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(captured) == len(layers):
            raise _AllCaptured

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(capture).remove)
        yield captured
