"""The calibration text on its way through the blocks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from matquant.models.blocks import BlockModel


class Stream:
    """Hidden states of the calibration windows, in front of one block after the other.

    Args:
        blocks: the model.
        windows: int64 [sequences, length].
        batch_size: windows in one forward pass; changes nothing but speed and memory.
        device: where blocks run.
        dtype: in which they run.
    """

    def __init__(
        self, blocks: BlockModel, windows: Tensor, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self._windows = blocks.prepare_windows(windows, batch_size, device, dtype)

    def run(self, index: int, weights: Mapping[str, Tensor] | None = None, *, advance: bool = False) -> None:
        """Run block ``index`` on all windows, for what hooks see of it.

        Args:
            weights: of some of its linear layers, by full name, instead of their own.
            advance: let what the block puts out be what enters the next one.
        """
        hidden = self._windows.hidden
        with self.blocks.on_device(index, self.device, self.dtype), self.blocks.with_weights(index, weights or {}):
            for rows, calls in zip(self._windows.rows, self._windows.calls, strict=True):
                output = self.blocks.run_block(index, hidden[rows].to(self.device), calls[index])
                if advance:
                    hidden[rows] = output
