"""Planes that are not needed for now, in host memory instead of the device's. Works without vLLM.

Planes are stored most significant first, so that a tensor whose storage is cut short still holds the first ones. Its shape
stays, and compiled code with it. Its address changes, so that captured CUDA graphs must be captured again.
"""

import tempfile

import torch
from torch import Tensor


class PlaneMemory:
    """Storage of the planes of one layer.

    Args:
        planes: tensor [planes, ...] that owns its storage.
    """

    def __init__(self, planes: Tensor) -> None:
        self._planes = planes
        self._host: Tensor | None = None  # all planes but the first `_host_from`
        self._host_from = 0

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self._planes[0].numel() * self._planes.element_size()

    @property
    def resident(self) -> int:
        """Number of planes in the device's memory."""
        return self._planes.untyped_storage().nbytes() // max(self.plane_bytes, 1)

    def keep(self, count: int) -> bool:
        """Keep the first ``count`` planes in the device's memory. Returns True if storage has changed."""
        count = min(count, self._planes.shape[0])
        resident = self.resident
        if count == resident:
            return False
        if count < resident:
            self._save(count)
            self._planes.untyped_storage().resize_(count * self.plane_bytes)
            return True
        assert self._host is not None
        self._planes.untyped_storage().resize_(count * self.plane_bytes)
        start = resident - self._host_from
        self._planes[resident:count].copy_(self._host[start : start + count - resident])
        return True

    def _save(self, count: int) -> None:
        """Have a copy of all planes from ``count`` on in host memory. Planes do not change, so that it is made once."""
        if self._host is not None and self._host_from <= count:
            return
        end = self._planes.shape[0] if self._host is None else self._host_from
        tail = self._planes[count:end]
        parts = [tail] if self._host is None else [tail, self._host]
        host = _host_tensor([sum(len(part) for part in parts), *tail.shape[1:]], self._planes)
        start = 0
        for part in parts:
            host[start : start + len(part)].copy_(part)
            start += len(part)
        self._host, self._host_from = host, count


def _host_tensor(shape: list[int], like: Tensor) -> Tensor:
    """Memory for planes: pinned for a GPU; for a CPU a temporary file, which the system writes out when memory is short."""
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, pin_memory=True)
    size = int(torch.Size(shape).numel())
    with tempfile.NamedTemporaryFile(prefix="matquant-planes-") as file:
        file.truncate(size * like.element_size())
        return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)
