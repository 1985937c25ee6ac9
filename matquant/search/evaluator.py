"""Loss of candidates on a text, from one model in memory.

Measures for speed:
  - a layer changes its bit-width in place (``matquant.search.layer_forwards``);
  - leading blocks that several candidates share are computed once (``matquant.search.mixed_bit_model``);
  - several candidates share one forward pass, up to ``batch_size`` sequences (``matquant.search.candidate_batching``);
  - the full-precision model runs once, and only a small reference is kept (``matquant.search.fitness``);
  - losses are summed on the device, with one synchronization per call.
"""

import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.errors import UserError, shorten
from matquant.models.blocks import BlockModel
from matquant.search.allocation_problem import AllocationUnit, Candidate
from matquant.search.candidate_batching import TokenBatch
from matquant.search.fitness import FitnessFunction
from matquant.search.layer_forwards import LayerForwards
from matquant.search.mixed_bit_model import BlockPath, MixedBitModel
from matquant.search.token_sample import TokenSample, all_tokens, draw_tokens

# Largest share of a GPU's free memory for the reference of the full-precision model; a larger one stays in host memory.
_REFERENCE_SHARE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorConfig:
    """Settings of an evaluator.

    Attributes:
        fitness: loss of a candidate.
        batch_size: sequences of one forward pass, over all candidates in it.
        device: device of the model.
        process_group: processes that share the candidates.
    """

    fitness: FitnessFunction
    batch_size: int
    device: torch.device
    process_group: ProcessGroup = SINGLE_PROCESS


@dataclasses.dataclass(slots=True)
class SearchCost:
    """Number of candidates that were evaluated, and the sum of their tokens."""

    evaluations: int = 0
    tokens: int = 0


class Evaluator:
    """Evaluation of candidates. Construct it with ``open_evaluator``.

    Attributes:
        sequences: int64 [sequences, length], the text.
        cost: cost of all calls of ``losses``, summed over the processes.
    """

    def __init__(self, model: MixedBitModel, sequences: Tensor, config: EvaluatorConfig) -> None:
        self.model = model
        self.sequences = sequences
        self.config = config
        self.cost = SearchCost()
        self._reference: tuple[Tensor, ...] = self._make_reference() if config.fitness.needs_reference else ()

    def all_tokens(self) -> TokenSample:
        """Sample of the whole text."""
        sequences, length = self.sequences.shape
        return all_tokens(sequences, length)

    def draw(self, tokens: int, rng: random.Random) -> TokenSample:
        """Draw a sample of ``tokens`` tokens; the whole text if it is shorter."""
        sequences, length = self.sequences.shape
        return draw_tokens(sequences, length, tokens, rng)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Candidate], sample: TokenSample) -> list[float]:
        """Mean loss of each candidate over the predicted tokens of a sample, in nats per token.

        The result does not depend on the number of processes.

        Args:
            candidates: bit-width, or ``FULL_PRECISION``, of each unit.
            sample: tokens of the text.

        Raises:
            UserError: the loss of a candidate is not finite.
        """
        passes = self._own_passes(self._passes(candidates, min(self.config.batch_size, len(sample.rows))))
        sums = torch.zeros(len(candidates), dtype=torch.float64, device=self.config.device)
        predicted = 0
        for rows, length in sample.batches(self.config.batch_size):
            predicted += len(rows) * (length - 1)
            if passes:
                self._add_losses(candidates, passes, rows, length, sums)
        self.config.process_group.all_reduce(sums)
        self.cost.evaluations += len(candidates)
        self.cost.tokens += len(candidates) * sample.tokens
        losses: list[float] = (sums / predicted).tolist()
        for candidate, loss in zip(candidates, losses, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"The search measured a loss of {loss} for the bit-widths {shorten([str(b) for b in candidate], 8)}: the "
                    "logits hold NaN or Inf. Check the model and the calibration text; a model in float16 may need "
                    "model.dtype=bfloat16."
                )
        return losses

    def _passes(self, candidates: Sequence[Candidate], sequences: int) -> list[list[int]]:
        """Indices of the candidates of each forward pass, of ``sequences`` sequences per candidate.

        Independent of the number of processes, so that it does not change the result.
        """
        order = sorted(range(len(candidates)), key=lambda c: self.model.sort_key(candidates[c]))
        size = max(1, self.config.batch_size // sequences) if self.model.supports_batching else 1
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _own_passes(self, passes: list[list[int]]) -> list[list[int]]:
        """Shard of the passes for this process; empty if there are fewer passes than processes."""
        rank, world_size = self.config.process_group.rank, self.config.process_group.world_size
        return passes[rank * len(passes) // world_size : (rank + 1) * len(passes) // world_size]

    def _add_losses(
        self,
        candidates: Sequence[Candidate],
        passes: Sequence[Sequence[int]],
        rows: Sequence[int],
        length: int,
        sums: Tensor,
    ) -> None:
        """Add the losses on some sequences, cut to ``length``, to ``sums``, float64 [candidates], without a synchronization."""
        batch = TokenBatch(self.model.blocks, self.sequences[rows, :length].to(self.config.device))
        summed_loss = self.config.fitness.summed_loss(
            batch.ids,
            [tensor[rows, :length].to(self.config.device) for tensor in self._reference],
            functools.partial(self.model.full_precision_head, batch.ids),
        )
        path = BlockPath(batch)
        for indices in passes:
            self.model.run([candidates[c] for c in indices], path)
            logits = self.model.logits(path, len(indices))
            for c, own in zip(indices, logits.split(len(rows)), strict=True):
                sums[c] += summed_loss(own[:, :-1])

    @torch.no_grad()
    def _make_reference(self) -> tuple[Tensor, ...]:
        """Run the full-precision model on the whole text and keep the tensors of the fitness function."""
        kept = []
        for rows, _ in self.all_tokens().batches(self.config.batch_size):
            path = BlockPath(TokenBatch(self.model.blocks, self.sequences[rows].to(self.config.device)))
            self.model.run_full_precision(path)
            head = functools.partial(self.model.full_precision_head, path.batch.ids)
            kept.append([tensor.cpu() for tensor in self.config.fitness.reference(path.output, head)])
        return tuple(self._place(torch.cat(parts)) for parts in zip(*kept, strict=True))

    def _place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device if it has enough free memory."""
        device = self.config.device
        fits = device.type == "cuda" and tensor.nbytes <= _REFERENCE_SHARE * torch.cuda.mem_get_info(device)[0]
        return tensor.to(device) if fits else tensor


@contextlib.contextmanager
def open_evaluator(
    blocks: BlockModel,
    units: Sequence[AllocationUnit],
    layer_forwards: LayerForwards,
    sequences: Tensor,
    config: EvaluatorConfig,
) -> Iterator[Evaluator]:
    """Evaluator of a model that is on the device, in the dtype of ``layer_forwards``, until the context ends.

    The model has its own weights and forward functions again afterwards.

    Args:
        sequences: int64 [sequences, length], the text.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(blocks.head_on_device(config.device, layer_forwards.dtype))
        for index in range(len(blocks)):
            stack.enter_context(blocks.on_device(index, config.device, layer_forwards.dtype))
        model = MixedBitModel(blocks, units, layer_forwards)
        stack.callback(model.restore)
        yield Evaluator(model, sequences, config)
