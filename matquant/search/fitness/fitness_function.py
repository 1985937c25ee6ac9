"""Base class of the losses that compare a candidate with the full-precision model."""

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from matquant.search.config import SearchConfig

Head = Callable[[Tensor], Tensor]  # hidden states [batch, length, hidden] -> logits [batch, length, vocabulary]
SummedLoss = Callable[[Tensor], Tensor]  # candidate's logits [batch, length - 1, vocabulary] -> sum over tokens, 0-dim


class FitnessFunction(abc.ABC):
    """Loss of a candidate's logits, summed over tokens.

    Results stay on the device. No method synchronizes with the GPU, so that work for the next candidate can be queued.
    """

    needs_reference: ClassVar[bool] = True  # False if the loss does not use the full-precision model

    @classmethod
    def from_config(cls, config: "SearchConfig") -> "FitnessFunction":
        """Construct the function with the settings of a search."""
        return cls()

    @abc.abstractmethod
    def reference(self, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Tensors of the full-precision model that ``summed_loss`` needs.

        Args:
            hidden: output of the last block, [batch, length, hidden].
            head: output head of the full-precision model.

        Returns:
            Tensors [batch, length, ...].
        """

    @abc.abstractmethod
    def summed_loss(self, ids: Tensor, reference: Sequence[Tensor], head: Head) -> SummedLoss:
        """Construct the loss for one token batch.

        Args:
            ids: int64 [batch, length].
            reference: tensors of ``reference`` for these tokens.
            head: output head of the full-precision model.

        Returns:
            Function from the candidate's logits of the predicted tokens to their summed loss in nats.
        """
