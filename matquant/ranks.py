"""The processes that torchrun started for one job: which one this is, its share of the work, and what passes between them.

A job of one process needs no launcher; every method here then gives back what it was given. Tensors of a CPU go through gloo,
those of a GPU through NCCL. Only the first process writes results.
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

# A process that dies is noticed at once. This bounds the wait for one that works, such as a search in the first.
_PATIENCE = datetime.timedelta(days=1)


def number() -> int:
    """Which of the job's processes this one is, from torchrun's environment; known before they have met."""
    return int(os.environ.get("RANK", "0"))


class Ranks:
    """One of ``count`` processes of a job, number ``rank``."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: int, rank: int | None = None) -> slice:
        """This process's (or another's) part of so many items in a row. Never empty: where there are fewer than processes,
        several have the same one."""
        rank = self.rank if rank is None else rank
        start = rank * items // self.count
        return slice(start, max(start + 1, (rank + 1) * items // self.count))

    def share_windows(self, sequences: int, batch_size: int) -> slice:
        """This process's part of calibration windows: whole batches, if there are enough, so that sums are over the same ones
        whatever the number of processes."""
        batches = -(-sequences // batch_size)
        if batches < self.count:
            return self.share(sequences)
        part = self.share(batches)
        return slice(part.start * batch_size, min(part.stop * batch_size, sequences))

    def add(self, tensor: Tensor) -> None:
        """Make a tensor the sum of those of all processes."""
        if self.count > 1:
            with _together():
                dist.all_reduce(tensor)

    def copy(self, tensor: Tensor, source: int) -> None:
        """Make a contiguous tensor, of any dtype, what it is in the process ``source``."""
        if self.count > 1:
            content = tensor.view(torch.uint8)
            with _together():
                dist.broadcast(content, source)

    def join(self, part: Tensor, rows: int) -> Tensor:
        """The matrix of so many rows of which each process has its ``share``: one below the other, the same in all."""
        if self.count == 1:
            return part
        whole = part.new_empty(rows, *part.shape[1:])
        whole[self.share(rows)] = part
        for source in range(self.count):
            self.copy(whole[self.share(rows, source)], source)
        return whole

    def tell(self, value: Any = None, source: int = 0) -> Any:
        """What the process ``source`` gives, JSON-able, in all processes."""
        if self.count == 1:
            return value
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self.copy(size, source)
        if self.rank != source:
            content = torch.empty(int(size), dtype=torch.uint8)
        self.copy(content, source)
        return json.loads(bytes(content.tolist()))

    def in_turn(self, work: Callable[[], T]) -> T:
        """``work`` of the first process, and then that of the others, which find in the store what the first one made."""
        if not self.first:
            self.tell()
        done = work()
        if self.first:
            self.tell()
        return done


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Inside, the processes of this job are connected.

    Args:
        device: where this one runs blocks.

    Raises:
        UserError: they do not find one another.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(number(), count)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What torch raises when another process is gone becomes a sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Another process of this job ended, or cannot be reached any more ({reason}). Finished blocks are kept: the "
            "same command goes on from there, with any number of processes."
        ) from error
