"""The calibration text on its way through the blocks: as the full-precision model sees it, and as its slices do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from matquant.models.activation_cache import OffloadTarget
from matquant.models.blocks import BlockModel

Weights = Mapping[str, Tensor]  # of some linear layers of a block, by full name, instead of their own

FULL = "full"


class ActivationStreams:
    """Hidden states of the calibration windows in front of one block after the other, one stream per variant of the model.

    A block has to be on the device (``BlockModel.on_device``) while inputs are caught in it or streams advance through it.

    Args:
        blocks: the model.
        windows: int64 [sequences, length].
        names: of the streams, such as ``full`` or a width.
        batch_size: windows in one forward pass; changes nothing but speed and memory.
        device: where blocks run.
        dtype: in which they run.
        place: where the hidden states wait; ``device`` when None.
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
        # All variants have the same embeddings, so the streams part at the first block.
        self.hidden = {
            name: self._windows.hidden.clone() if i else self._windows.hidden for i, name in enumerate(names)
        }

    def inputs(
        self, index: int, layers: Sequence[nn.Linear], weights: Mapping[str, Weights]
    ) -> Iterator[dict[str, list[Tensor | None]]]:
        """What reaches some layers of block ``index`` (or the head, the block after the last), batch by batch.

        The block runs no further than it has to.

        Args:
            layers: linear layers of the block.
            weights: of each stream.

        Yields:
            For each stream the input of each layer, [tokens, in_features], or None where it was not called.
        """
        for batch, rows in enumerate(self._windows.rows):
            found = {}
            for name, hidden in self.hidden.items():
                # The exception ends before it reaches a context manager made of a generator. From Python 3.12 on that would be
                # part of its traceback: a cycle that keeps all that the forward pass had made.
                changed = self.blocks.with_weights(index, weights.get(name, {}))
                with changed, _caught(layers) as caught, suppress(_Enough):
                    self._run(index, batch, hidden[rows])
                found[name] = [caught.get(layer) for layer in layers]
            yield found

    def _run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        if index == len(self.blocks):
            return self.blocks.head(self._ids[self._windows.rows[batch]].to(self.device), hidden)
        return self.blocks.run_block(index, hidden, self._windows.calls[batch][index])

    def advance(self, index: int, weights_of: Callable[[str], Weights]) -> None:
        """Let what block ``index`` puts out, with each stream's weights, be what enters the next one.

        Args:
            weights_of: asked for one stream after the other, so that the weights of one at a time need memory.
        """
        for name, hidden in self.hidden.items():
            with self.blocks.with_weights(index, weights_of(name)):
                for batch, rows in enumerate(self._windows.rows):
                    hidden[rows] = self._run(index, batch, hidden[rows])


class _Enough(Exception):
    """Leaves a block's forward once all inputs are caught."""


@contextmanager
def _caught(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, the first input of each layer is caught, and a forward pass ends with _Enough when there is one of each."""
    caught: dict[nn.Module, Tensor] = {}

    def catch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(caught) == len(layers):
            raise _Enough

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(catch).remove)
        yield caught
