"""Processes that torchrun started for one job: rank, sharding of the work, and collectives.

A job of one process needs no launcher; every collective then returns its argument. CPU tensors go through gloo, CUDA tensors
through NCCL. Rank 0 alone writes results.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from matquant.errors import UserError

T = TypeVar("T")

# A process that dies is noticed at once. This bounds the wait for a process that works, such as a search on rank 0.
_TIMEOUT = datetime.timedelta(days=1)


def rank_from_env() -> int:
    """Rank of this process from torchrun's environment; known before the process group is initialized."""
    return int(os.environ.get("RANK", "0"))


class ProcessGroup:
    """Process ``rank`` of the ``world_size`` processes of a job.

    Attributes:
        rank: of this process, 0 to ``world_size - 1``.
        world_size: number of processes.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    @property
    def is_main(self) -> bool:
        """True for the process that writes."""
        return self.rank == 0

    def shard(self, items: int, rank: int | None = None) -> slice:
        """Contiguous shard of ``items`` for this rank or another one.

        Never empty: with fewer items than processes, several processes have the same shard.
        """
        rank = self.rank if rank is None else rank
        start = rank * items // self.world_size
        return slice(start, max(start + 1, (rank + 1) * items // self.world_size))

    def shard_batches(self, sequences: int, batch_size: int) -> slice:
        """Shard of calibration sequences in whole batches, so that sums run over the same batches at every world size.

        With fewer batches than processes the sequences are sharded one by one.
        """
        batches = -(-sequences // batch_size)
        if batches < self.world_size:
            return self.shard(sequences)
        part = self.shard(batches)
        return slice(part.start * batch_size, min(part.stop * batch_size, sequences))

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            with _explain_lost_process():
                dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy a contiguous tensor of any dtype from rank ``source`` to all processes, in place."""
        if self.world_size > 1:
            content = tensor.view(torch.uint8)
            with _explain_lost_process():
                dist.broadcast(content, source)

    def all_gather_rows(self, part: Tensor, rows: int) -> Tensor:
        """Gather the ``shard`` of each process into a matrix of ``rows`` rows, in all processes."""
        if self.world_size == 1:
            return part
        matrix = part.new_empty(rows, *part.shape[1:])
        matrix[self.shard(rows)] = part
        for source in range(self.world_size):
            self.broadcast(matrix[self.shard(rows, source)], source)
        return matrix

    def broadcast_object(self, value: Any = None, source: int = 0) -> Any:
        """Return the JSON-able value of rank ``source`` in all processes."""
        if self.world_size == 1:
            return value
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self.broadcast(size, source)
        if self.rank != source:
            content = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content, source)
        return json.loads(bytes(content.tolist()))

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0, then on the other ranks, which find its result in the store."""
        if not self.is_main:
            self.broadcast_object()
        done = work()
        if self.is_main:
            self.broadcast_object()
        return done


SINGLE_PROCESS = ProcessGroup()


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[ProcessGroup]:
    """Connect the processes of this job while the context is open.

    Args:
        device: of this process.

    Raises:
        UserError: the processes cannot connect.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _explain_lost_process():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield ProcessGroup(rank_from_env(), world_size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _explain_lost_process() -> Iterator[None]:
    """Translate torch's error about a lost process into a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Another process of this job ended, or cannot be reached any more ({reason}). Finished blocks are kept: the "
            "same command continues from there, with any number of processes."
        ) from error
