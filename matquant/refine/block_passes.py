"""Forward and backward pass of one batch through all blocks with the slice of one bit-width.

Only the hidden states between blocks are kept: the backward pass runs each block once more. On a GPU both passes can be
captured as CUDA graphs, because the launches of a small model take longer than its kernels.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from matquant.models.block_kwargs import PerBlockKwargs
from matquant.refine.slice_reader import SliceReader

Trained = Mapping[str, Tensor]  # by layer: float32 scales [out_features, groups] or weights, which require gradients


class Passes(Protocol):
    """Both passes of one batch; ``backward`` belongs to the last ``forward``."""

    def forward(self, hidden: Tensor, trained: Trained) -> Tensor:
        """Hidden states after the last block, [sequences, length, hidden], for those in front of block 0."""

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the trained tensors of the blocks by layer, for the gradient of the output of ``forward``."""


class BlockPasses:
    """Passes that run block by block.

    Args:
        reader: of the model, on its device.
        bits: bit-width of the slice.
        kwargs: other arguments of the blocks for this batch.
    """

    def __init__(self, reader: SliceReader, bits: int, kwargs: PerBlockKwargs) -> None:
        self._reader, self._bits, self._kwargs = reader, bits, kwargs
        self._states: list[Tensor] = []
        self._trained: Trained = {}

    @torch.no_grad()
    def forward(self, hidden: Tensor, trained: Trained) -> Tensor:
        self._states, self._trained = [hidden], trained
        with self._reader.reading(self._bits, trained):
            for index, kwargs in enumerate(self._kwargs):
                self._states.append(self._reader.blocks.run_block(index, self._states[-1], kwargs))
        return self._states[-1]

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers, trained = self._reader.layers_of_blocks, self._trained
        for index in reversed(range(len(self._kwargs))):
            below = any(layers[:index])
            if not below and not layers[index]:
                break
            with torch.enable_grad(), self._reader.reading(self._bits, trained):
                hidden = self._states[index].detach().requires_grad_(below)
                output = self._reader.blocks.run_block(index, hidden, self._kwargs[index])
                wanted = [*(trained[name] for name in layers[index]), *([hidden] if below else [])]
                gradients = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
            for name, one in zip(layers[index], gradients, strict=False):
                if one is not None:  # else an expert without tokens
                    found[name] = found[name] + one if name in found else one
            gradient = gradients[-1]
        return found


class GraphedPasses:
    """Passes that are replayed as CUDA graphs, for batches of one shape with the same other arguments.

    Args:
        passes: what is captured; used by nothing else, since it holds the hidden states between the two graphs.
        hidden, trained: of any such batch.
        pool: handle of a memory pool, which graphs share that never run at the same time.

    Raises:
        RuntimeError: a block does what no graph can hold, such as to route tokens to experts.
    """

    def __init__(self, passes: BlockPasses, hidden: Tensor, trained: Trained, pool: Any) -> None:
        self._passes, self._hidden = passes, hidden.clone()
        self._trained = {name: one.detach().clone().requires_grad_() for name, one in trained.items()}
        side = torch.cuda.Stream(hidden.device)
        side.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(side):  # first calls load kernels and allocate workspaces
            self._gradient = torch.zeros_like(passes.forward(self._hidden, self._trained))
            passes.backward(self._gradient)
        torch.cuda.current_stream(hidden.device).wait_stream(side)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool):
            self._output = passes.forward(self._hidden, self._trained)
        with torch.cuda.graph(self._backward, pool=pool):
            self._gradients = passes.backward(self._gradient)

    @torch.no_grad()
    def forward(self, hidden: Tensor, trained: Trained) -> Tensor:
        self._hidden.copy_(hidden)
        torch._foreach_copy_(list(self._trained.values()), [trained[name] for name in self._trained])
        self._forward.replay()
        return self._output

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        self._gradient.copy_(gradient)
        self._backward.replay()
        return self._gradients
