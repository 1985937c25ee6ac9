"""Values of a model's tensors: read from the checkpoint, transformed, and put on a device while they are needed there.

Every weight of a model passes ``WeightMaterializer.read``, the one place where a weight transform is applied.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from matquant.inference.experts import SourceView
from matquant.models.checkpoint import Checkpoint
from matquant.models.tensor_swap import named_tensors, set_tensor, swapped_tensors

TensorFunction = Callable[[Tensor], Tensor]  # new values of a tensor: same shape, dtype and device


class WeightMaterializer:
    """Provider of the values of one model's tensors.

    Args:
        checkpoint: reader of the tensors that are on the meta device.
        source_views: location in the checkpoint of the tensors that have another name or shape there.
        dtype: of the blocks' weights. With float32 as target all floating-point tensors are converted, else only those
            of this dtype: tensors that a half-precision model keeps in float32 stay so.

    Attributes:
        plan: function of each tensor that a weight transform changes, by full name.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, source_views: Mapping[str, SourceView], dtype: torch.dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.source_views = source_views
        self.dtype = dtype
        self.plan: dict[str, TensorFunction] = {}

    @contextmanager
    def materialized(
        self,
        module: nn.Module,
        path: str,
        wanted: Callable[[str], bool],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Iterator[None]:
        """Put the wanted tensors of a module on ``device`` in ``dtype`` inside the context, without gradients.

        Args:
            path: full name of the module.
            wanted: predicate on tensor names below the module.
        """
        originals = {name: tensor for name, tensor in named_tensors(module) if wanted(name)}
        with swapped_tensors(module, self._materialize(originals, path, device, dtype)):
            yield

    def _materialize(
        self, originals: Mapping[str, Tensor], path: str, device: torch.device | str, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Values of these tensors. No reference to a stored tensor remains, since that would keep its file mapped."""
        values: dict[int, Tensor] = {}  # tied tensors stay one object
        for name, stored in self.read(originals, path, device):
            if id(originals[name]) not in values:
                convert = dtype == torch.float32 or stored.dtype == self.dtype
                target = dtype if stored.is_floating_point() and convert else stored.dtype
                values[id(originals[name])] = stored.to(device, target)
        return {name: values[id(tensor)] for name, tensor in originals.items()}

    @torch.no_grad()
    def fill(self, module: nn.Module, exclude: Collection[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Set all tensors of a whole model for good, on ``device`` in ``dtype``, except those in ``exclude``."""
        originals = {name: tensor for name, tensor in named_tensors(module) if name not in exclude}
        filled: dict[int, Tensor] = {}  # tied tensors stay one object
        for name, stored in self.read(originals, "", device):
            key = id(originals[name])
            value = filled.get(key)
            if value is None:
                value = stored.to(device, dtype if stored.is_floating_point() else stored.dtype)
            filled[key] = set_tensor(module, name, value)
        self.plan = {name: function for name, function in self.plan.items() if name in exclude}

    def read(
        self, originals: Mapping[str, Tensor], path: str = "", device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the values of tensors one at a time, transformed and without gradients.

        A tensor that has values gives itself, one on the meta device is read from the checkpoint.

        Args:
            originals: tensors of the model by name below ``path``.
            device: on which transforms are computed; other tensors stay where they are.

        Raises:
            ValueError: a tensor is on the meta device and there is no checkpoint.
            UserError: a file of the checkpoint is damaged or was removed.
        """
        stored: dict[str, list[tuple[str, str, SourceView]]] = {}
        for name, tensor in originals.items():
            full = f"{path}.{name}" if path else name
            if tensor.is_meta:
                view = self.source_views.get(full, SourceView(full))
                stored.setdefault(view.name, []).append((name, full, view))
            else:
                yield name, self.transform(full, tensor.detach(), device)
        if stored and self.checkpoint is None:
            raise ValueError(f"{path or 'the model'} is on the meta device, and there is no checkpoint to read it from")
        if stored and self.checkpoint is not None:
            for source, tensor in self.checkpoint.read(stored):
                for name, full, view in stored[source]:
                    yield name, self.transform(full, view.view(tensor), device)

    def transform(self, name: str, tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Apply the weight transform on ``device``; return the tensor itself if the transform leaves it unchanged.

        Args:
            name: full name in the model.
            tensor: [out_features, in_features] for the weight of a linear layer.
        """
        return self.plan[name](tensor.to(device)) if name in self.plan else tensor
