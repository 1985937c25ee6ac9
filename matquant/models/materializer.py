"""The values of a model's tensors, converted and on a device for as long as they are needed there."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matquant.inference.experts import SourceView
from matquant.models.checkpoint import Checkpoint
from matquant.models.tensor_swap import named_tensors, swapped_tensors


class WeightMaterializer:
    """Lends the modules of one model their values.

    Args:
        checkpoint: reads the tensors that are on the meta device.
        origins: of the layers that have another name or shape than in the checkpoint.
        dtype: of the blocks' weights. In float32 everything floating is converted, else only what has this one: what a
            half-precision model keeps in float32 stays so.
    """

    def __init__(self, checkpoint: Checkpoint | None, origins: Mapping[str, SourceView], dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.origins = origins
        self.dtype = dtype

    @contextmanager
    def converted(
        self,
        module: nn.Module,
        path: str,
        wanted: Callable[[str], bool],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Iterator[None]:
        """Inside, the wanted tensors of the module are on ``device`` in ``dtype``; ``path`` is its full name."""
        own = {name: tensor for name, tensor in named_tensors(module) if wanted(name)}
        with swapped_tensors(module, self._converted(own, path, device, dtype)):
            yield

    def _converted(
        self, own: Mapping[str, Tensor], path: str, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The values of these tensors. None of what they were made of is alive afterwards: it would keep its file mapped."""
        memo: dict[int, Tensor] = {}  # tied tensors stay one
        for name, stored in self._read(own, path):
            if id(own[name]) not in memo:
                narrow = dtype == torch.float32 or stored.dtype == self.dtype
                converted = dtype if stored.is_floating_point() and narrow else stored.dtype
                memo[id(own[name])] = stored.to(device, converted)
        return {name: memo[id(tensor)] for name, tensor in own.items()}

    @torch.no_grad()
    def fill(self, module: nn.Module, but: Collection[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Give all tensors of a whole model their values for good, on ``device`` in ``dtype``, except the named ones."""
        own = {name: tensor for name, tensor in named_tensors(module) if name not in but}
        memo: dict[int, Tensor] = {}  # tied tensors stay one
        for name, stored in self._read(own, ""):
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            if id(own[name]) not in memo:
                value = stored.to(device, dtype if stored.is_floating_point() else stored.dtype)
                is_parameter = leaf in owner._parameters
                memo[id(own[name])] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            held[leaf] = memo[id(own[name])]

    def _read(self, own: Mapping[str, Tensor], path: str) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its values: itself, or when it is on the meta device what the checkpoint holds of it."""
        read: dict[str, list[tuple[str, SourceView]]] = {}
        for name, tensor in own.items():
            if tensor.is_meta:
                full = f"{path}.{name}" if path else name
                origin = self.origins.get(full, SourceView(full))
                read.setdefault(origin.name, []).append((name, origin))
            else:
                yield name, tensor
        if read and self.checkpoint is None:
            raise ValueError(
                f"{path} has no values: the model was not loaded, and there is no checkpoint to read it from"
            )
        if read and self.checkpoint is not None:
            for source, tensor in self.checkpoint.read(read):
                for name, origin in read[source]:
                    yield name, origin.view(tensor)
