"""Hidden states that wait between two blocks: on the device, in the host's memory, or in a file, as they fit."""

import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant import machine
from matquant.store.files import translate_os_errors

OffloadTarget = torch.device | Path  # a device, or the folder of a file

# Of what is free, hidden states may take so much: blocks, Hessians and their factors come on top where blocks run. The memory
# of the host beside a GPU holds little else.
_SHARE, _SHARE_BESIDE = 0.4, 0.8


def choose_offload_target(needed: int, device: torch.device, scratch: Path) -> OffloadTarget:
    """The fastest place with room for ``needed`` bytes of hidden states.

    Args:
        device: where blocks run.
        scratch: folder for a file, when neither the device nor the host has the room.
    """
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if needed < (_SHARE if place == device else _SHARE_BESIDE) * machine.device_free(place):
            return place
    return scratch


class ActivationCache:
    """Hidden states [sequences, length, hidden] of one model, read and written by slices of sequences.

    In a file they are neither mapped nor kept in memory. The file has no name, so nothing is left of it after a crash. In the
    host's memory beside a GPU they are page-locked, and copies do not wait for the GPU nor it for them.

    Args:
        device: where blocks run.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """

    def __init__(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, place: OffloadTarget, device: torch.device
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.place = place
        self.device = device
        self._tensor: Tensor | None = None
        self._locked = False
        if isinstance(place, Path):
            with translate_os_errors(place):
                place.mkdir(parents=True, exist_ok=True)
                self._file: Any = tempfile.TemporaryFile(dir=place)  # noqa: SIM115  (lives as long as this object)
        else:
            self._tensor = torch.empty(self.shape, dtype=dtype, device=place)
            if place.type == "cpu" and device.type == "cuda":
                self._locked = _lock(self._tensor, device)
            if self._locked:
                weakref.finalize(self, _unlock, self._tensor)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> Tensor:
        """[rows, length, hidden] on the device where blocks run."""
        if self._tensor is not None:
            return self._tensor[rows].to(self.device, non_blocking=self._locked)
        start, stop, _ = rows.indices(self.shape[0])
        part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        with translate_os_errors(Path(str(self.place))):
            self._file.seek(start * self._row_bytes())
            self._file.readinto(part.view(torch.uint8).numpy().data)
        return part.to(self.device)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        if self._tensor is not None:
            # What is read later is copied on the same stream, and so after this.
            self._tensor[rows].copy_(values, non_blocking=self._locked)
            return
        part = values.detach().to("cpu", self.dtype).contiguous()
        with translate_os_errors(Path(str(self.place)), part.nbytes):
            self._file.seek(rows.indices(self.shape[0])[0] * self._row_bytes())
            self._file.write(part.view(torch.uint8).numpy().data)
            self._file.flush()

    def clone(self) -> "ActivationCache":
        copy = ActivationCache(self.shape, self.dtype, self.place, self.device)
        for start in range(self.shape[0]):
            copy[start : start + 1] = self[start : start + 1]
        return copy

    def _row_bytes(self) -> int:
        return self.shape[1:].numel() * self.dtype.itemsize


def _lock(tensor: Tensor, device: torch.device) -> bool:
    """Page-lock the memory of a host's tensor; torch's own page-locked tensors may take twice their size.

    Returns:
        Whether the system allows it.
    """
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == runtime.cudaError.success:
            return True
        with suppress(RuntimeError):  # the runtime tells its last error once more, at the next launch
            torch.zeros(1, device=device)
    return False


def _unlock(tensor: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
