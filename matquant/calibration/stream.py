"""The calibration text on its way through the blocks: as the full-precision model sees it, and as its slices do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from matquant.models.blocks import BlockModel

Weights = Mapping[str, Tensor]  # of some linear layers of a block, by full name, instead of their own

FULL = "full"


class Streams:
    """Hidden states of the calibration windows in front of one block after the other, one stream per variant of the model.

    Args:
        blocks: the model.
        windows: int64 [sequences, length].
        names: of the streams, such as ``full`` or a width.
        batch_size: windows in one forward pass; changes nothing but speed and memory.
        device: where blocks run.
        dtype: in which they run.
    """

    def __init__(
        self, blocks: BlockModel, windows: Tensor, names: Sequence[str], batch_size: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self._windows = blocks.prepare_windows(windows, batch_size, device, dtype)
        # All variants have the same embeddings, so the streams part at the first block.
        self.hidden = {name: self._windows.hidden.clone() if i else self._windows.hidden for i, name in enumerate(names)}

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Inside, block ``index`` is on the device, ready to run."""
        with self.blocks.on_device(index, self.device, self.dtype):
            yield

    def inputs(
        self, index: int, layers: Sequence[nn.Linear], weights: Mapping[str, Weights]
    ) -> Iterator[dict[str, list[Tensor | None]]]:
        """What reaches some layers of block ``index``, batch by batch; the block runs no further than it has to.

        Args:
            layers: linear layers of the block.
            weights: of each stream.

        Yields:
            For each stream the input of each layer, [tokens, in_features], or None where it was not called.
        """
        for rows, calls in zip(self._windows.rows, self._windows.calls, strict=True):
            found = {}
            for name, hidden in self.hidden.items():
                with self.blocks.with_weights(index, weights.get(name, {})), _caught(layers) as caught:
                    self.blocks.run_block(index, hidden[rows].to(self.device), calls[index])
                found[name] = [caught.get(layer) for layer in layers]
            yield found

    def advance(self, index: int, weights: Mapping[str, Weights]) -> None:
        """Let what block ``index`` puts out, with each stream's weights, be what enters the next one."""
        for name, hidden in self.hidden.items():
            with self.blocks.with_weights(index, weights.get(name, {})):
                for rows, calls in zip(self._windows.rows, self._windows.calls, strict=True):
                    hidden[rows] = self.blocks.run_block(index, hidden[rows].to(self.device), calls[index]).to(hidden.device)


class _Enough(Exception):
    """Leaves a block's forward once all inputs are caught."""


@contextmanager
def _caught(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """Inside, the first input of each layer is caught, and the forward pass ends when there is one of each."""
    caught: dict[nn.Linear, Tensor] = {}

    def catch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(caught) == len(layers):
            raise _Enough

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(catch).remove)
        try:
            yield caught
        except _Enough:
            pass
