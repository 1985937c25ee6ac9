"""Hidden states between two blocks, stored on the device, in host memory or in a file, depending on free memory."""

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

# Share of the free memory that hidden states may take. The device of the blocks also holds blocks, Hessians and their
# factors; the memory of a GPU's host holds little else.
_MAX_DEVICE_SHARE, _MAX_HOST_SHARE = 0.4, 0.8


def choose_offload_target(needed: int, device: torch.device, scratch: Path) -> OffloadTarget:
    """Fastest storage with room for ``needed`` bytes of hidden states.

    Args:
        device: of the blocks.
        scratch: folder for a file, in case neither the device nor the host has enough memory.
    """
    for target in dict.fromkeys((device, torch.device("cpu"))):
        share = _MAX_DEVICE_SHARE if target == device else _MAX_HOST_SHARE
        if needed < share * machine.device_free(target):
            return target
    return scratch


class ActivationCache:
    """Hidden states [sequences, length, hidden] of one model, read and written by slices of sequences.

    A file is read and written directly, neither mapped nor kept in memory. It has no name, so a crash leaves nothing
    behind. Host memory of a GPU is page-locked, and copies are asynchronous.

    Args:
        target: storage.
        device: of the blocks.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """

    def __init__(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, target: OffloadTarget, device: torch.device
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.target = target
        self.device = device
        self._tensor: Tensor | None = None
        self._page_locked = False
        if isinstance(target, Path):
            with translate_os_errors(target):
                target.mkdir(parents=True, exist_ok=True)
                self._file: Any = tempfile.TemporaryFile(dir=target)  # noqa: SIM115  (lives as long as this object)
        else:
            self._tensor = torch.empty(self.shape, dtype=dtype, device=target)
            if target.type == "cpu" and device.type == "cuda":
                self._page_locked = _page_lock(self._tensor, device)
            if self._page_locked:
                weakref.finalize(self, _page_unlock, self._tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> Tensor:
        """Hidden states [rows, length, hidden] on the device of the blocks."""
        if self._tensor is not None:
            return self._tensor[rows].to(self.device, non_blocking=self._page_locked)
        start, stop, _ = rows.indices(self.shape[0])
        part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        with translate_os_errors(Path(str(self.target))):
            self._file.seek(start * self._row_bytes())
            self._file.readinto(part.view(torch.uint8).numpy().data)
        return part.to(self.device)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Store hidden states [rows, length, hidden]; their autograd graph is dropped."""
        values = values.detach()
        if self._tensor is not None:
            # A later read is a copy on the same CUDA stream, so it runs after this one.
            self._tensor[rows].copy_(values, non_blocking=self._page_locked)
            return
        part = values.to("cpu", self.dtype).contiguous()
        with translate_os_errors(Path(str(self.target)), part.nbytes):
            self._file.seek(rows.indices(self.shape[0])[0] * self._row_bytes())
            self._file.write(part.view(torch.uint8).numpy().data)
            self._file.flush()

    def clone(self) -> "ActivationCache":
        """Copy in storage of the same kind."""
        copy = ActivationCache(self.shape, self.dtype, self.target, self.device)
        for start in range(self.shape[0]):
            copy[start : start + 1] = self[start : start + 1]
        return copy

    def _row_bytes(self) -> int:
        return self.shape[1:].numel() * self.dtype.itemsize


def _page_lock(tensor: Tensor, device: torch.device) -> bool:
    """Page-lock the memory of a CPU tensor; return False if the system does not allow it.

    ``torch.empty(pin_memory=True)`` may allocate twice the size.
    """
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == runtime.cudaError.success:
            return True
        with suppress(RuntimeError):  # the runtime reports its last error once more, at the next launch
            torch.zeros(1, device=device)
    return False


def _page_unlock(tensor: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
