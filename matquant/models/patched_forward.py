"""The model's own forward pass with its decoder blocks replaced.

One replacement records the arguments of every block, another inserts known hidden states after the last block. So
embeddings, masks, positions, final norm, head and soft-capping are the model's own code, for any architecture.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.block_kwargs import PerBlockKwargs, split_block_args
from matquant.models.tensor_swap import patched_forwards


class ForwardStopped(Exception):
    """End of the model's forward pass, once everything is recorded."""


@dataclass(frozen=True, slots=True)
class OutputForm:
    """Form of a block's output: the hidden states alone, or a tuple or list that begins with them.

    Attributes:
        container: ``tuple`` or ``list``; None for a tensor.
        length: of the container.
    """

    container: type | None = None
    length: int = 1

    @classmethod
    def of(cls, output: Any) -> "OutputForm":
        """Form of an output. Raises ValueError for another container."""
        if isinstance(output, Tensor):
            return cls()
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            return cls(type(output), len(output))
        raise ValueError(f"a block returns {type(output).__name__}, which does not begin with hidden states")

    def wrap(self, hidden: Tensor) -> Any:
        """Output with these hidden states, and None in every other place."""
        return hidden if self.container is None else self.container((hidden, *(None,) * (self.length - 1)))


def hidden_of(output: Any) -> Tensor:
    """Hidden states in the output of a block, see ``OutputForm``."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def unsupported_errors(model: nn.Module) -> Iterator[None]:
    """Turn any error of a model's code inside the context into a UserError.

    A UserError passes, and so does an error for lack of memory.
    """
    try:
        yield
    except (UserError, ForwardStopped, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # code of any architecture raises anything
        reason = (str(error) or "without a message").splitlines()[0].rstrip(".")
        raise UserError(
            f"{type(model).__name__} cannot be run block by block on tokens alone: its blocks exchange more than hidden "
            f"states, or it needs other inputs ({type(error).__name__}: {reason}). This architecture is not supported."
        ) from error


def block_order_error(model: nn.Module, path: str, found: str) -> UserError:
    """Error for a model that does not run its blocks one after the other, each once.

    Args:
        path: full name of the list of blocks.
        found: order that was found instead.
    """
    return UserError(
        f"{type(model).__name__} does not run the blocks {path} one after the other, each once: {found}. "
        "This architecture is not supported."
    )


class PatchedForward:
    """Forward passes of one model with replaced blocks.

    Args:
        model: causal language model of Transformers.
        blocks: its decoder blocks.
        path: full name of the list of blocks.

    Attributes:
        output_forms: form of the output of each class of blocks, as far as known.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], path: str) -> None:
        self.model = model
        self.blocks = blocks
        self.path = path
        self.output_forms: dict[type, OutputForm] = {}

    def record(self, input_ids: Tensor, count: int | None = None) -> tuple[Tensor, PerBlockKwargs]:
        """Record the input of block 0 and the arguments of the first ``count`` blocks (all by default), then stop.

        The output forms of all blocks but the last of them must be known.

        Args:
            input_ids: int64 [batch, length].

        Returns:
            Hidden states [batch, length, ...], and the other arguments of each block.

        Raises:
            UserError: the model does not run its blocks one after the other, each once, or passes hidden states of
                another shape.
        """
        count = len(self.blocks) if count is None else count
        inputs: list[Tensor] = []
        recorded: PerBlockKwargs = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index != len(recorded):
                    raise block_order_error(
                        self.model, self.path, f"block {index} was called as number {len(recorded)}"
                    )
                hidden, rest = split_block_args(args, kwargs)
                if index == 0:
                    self._check_shape(hidden, input_ids)
                    inputs.append(hidden)
                recorded.append(rest)
                if len(recorded) == count:
                    raise ForwardStopped
                return self._output(index, hidden)

            return forward

        with patched_forwards(self.blocks, [recorder(i) for i in range(len(self.blocks))]):
            try:
                self.model(input_ids=input_ids, use_cache=False)
            except ForwardStopped:
                return inputs[0], recorded
        raise block_order_error(self.model, self.path, f"only {len(recorded)} of {len(self.blocks)} were called")

    def logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for hidden states [batch, length, ...] after the last block.

        All output forms must be known.
        """
        last = len(self.blocks) - 1

        def passing(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._output(
                index, hidden if index == last else split_block_args(args, kwargs)[0]
            )

        with patched_forwards(self.blocks, [passing(index) for index in range(len(self.blocks))]):
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
            return logits

    def _output(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form of the output of block ``index``."""
        return self.output_forms[type(self.blocks[index])].wrap(hidden)

    def _check_shape(self, hidden: Any, input_ids: Tensor) -> None:
        """Raise UserError unless the input of block 0 is [batch, length, ...]."""
        if isinstance(hidden, Tensor) and hidden.ndim >= 3 and hidden.shape[:2] == input_ids.shape:
            return
        found = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UserError(
            f"{type(self.model).__name__} passes {found} to its blocks {self.path} for {list(input_ids.shape)} tokens, "
            "which do not begin with batch and length. This architecture is not supported."
        )
