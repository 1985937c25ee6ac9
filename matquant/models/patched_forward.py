"""The model's own forward pass with its decoder blocks replaced.

One replacement records the arguments of every block, another inserts known hidden states after the last block. So
embeddings, masks, positions, final norm, head and soft-capping are the model's own code, for any architecture.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.block_kwargs import PerBlockKwargs, split_block_args
from matquant.models.tensor_swap import patched_forwards


class ForwardStopped(Exception):
    """Ends the model's forward pass once everything is recorded."""


def hidden_of(output: Any) -> Tensor:
    """Hidden states in the output of a block, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


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
        tuple_length: length of a block's output if it is a tuple, 0 if it is a tensor; None until it is known.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], path: str) -> None:
        self.model = model
        self.blocks = blocks
        self.path = path
        self.tuple_length: int | None = None

    def record(self, input_ids: Tensor, count: int | None = None) -> tuple[Tensor, PerBlockKwargs]:
        """Record the input of block 0 and the arguments of the first ``count`` blocks (all by default), then stop.

        For more than one block ``tuple_length`` must be known.

        Args:
            input_ids: int64 [batch, length].

        Returns:
            Hidden states [batch, length, hidden], and the other arguments of each block.

        Raises:
            UserError: the model does not run its blocks one after the other, each once.
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
                    inputs.append(hidden)
                recorded.append(rest)
                if len(recorded) == count:
                    raise ForwardStopped
                return self._block_output(hidden)

            return forward

        with patched_forwards(self.blocks, [recorder(i) for i in range(len(self.blocks))]):
            try:
                self.model(input_ids=input_ids, use_cache=False)
            except ForwardStopped:
                return inputs[0], recorded
        raise block_order_error(self.model, self.path, f"only {len(recorded)} of {len(self.blocks)} were called")

    def logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for hidden states [batch, length, hidden] after the last block.

        ``tuple_length`` must be known.
        """
        last = self.blocks[-1]

        def passing(block: nn.Module) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._block_output(
                hidden if block is last else split_block_args(args, kwargs)[0]
            )

        with patched_forwards(self.blocks, [passing(block) for block in self.blocks]):
            return self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits

    def _block_output(self, hidden: Tensor) -> Any:
        """Hidden states in the form of a block's output."""
        return (hidden, *(None,) * (self.tuple_length - 1)) if self.tuple_length else hidden
