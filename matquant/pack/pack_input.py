"""Input of the packing: nested layers of a parent and all other tensors of the model, read one at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.parent import Parent
from matquant.inference.experts import SourceView
from matquant.models.blocks import BlockModel
from matquant.models.checkpoint_files import weight_files
from matquant.models.loading import LoadedModel
from matquant.models.tensor_swap import named_tensors


class PackInput:
    """Model and parent to pack.

    Attributes:
        folder: checkpoint of the model.
        layers: the parent's layers by full name, in its order.
        dense: every other tensor that is stored, under the name that the model gives it; tied ones once. Of experts that
            are one tensor in the model and of which some are nested, the rest is an entry for each expert.
        unconverted: linear layers that stay as they are, by name.
        untied_head: whether the head was tied to the embeddings and is a layer of its own now.
    """

    def __init__(self, loaded: LoadedModel, blocks: BlockModel, parent: Parent) -> None:
        self.loaded, self.blocks, self.parent = loaded, blocks, parent
        _check_transform(blocks, parent)
        self.folder = Path(loaded.model.config.name_or_path)
        self.layers = {
            n: LayerSpec.from_weight(w) for i in range(len(parent.blocks)) for n, w in parent.block(i).items()
        }
        self.origins = blocks.source_views
        self._views: dict[str, SourceView] = {}
        self.dense = self._dense()
        linear = [n for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        self.unconverted = [name for name in linear if name not in self.layers]
        head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
        tied = getattr(head, "weight", None) is embedding.weight
        nested_head = any(loaded.model.get_submodule(n) is head for n in self.layers if "." not in n)
        self.untied_head = blocks.untied_head or (tied and nested_head)

    def weights(self) -> Iterator[tuple[str, NestedWeight]]:
        """The nested layers in the order of ``layers``; a block is in memory at a time."""
        for index in range(len(self.parent.blocks)):
            yield from self.parent.block(index).items()

    def read(self, name: str) -> Tensor:
        """Tensor of ``dense``, transformed, on the CPU; mapped from its file if it is neither converted nor transformed."""
        origin = self._views[name]
        ((_, tensor),) = self.loaded.checkpoint.read([origin.name])
        return self.blocks.transform_tensor(name, origin.view(tensor))

    def original_shard(self) -> int:
        """Bytes of the largest weight file of the original."""
        return max((self.folder / name).stat().st_size for name in weight_files(self.folder))

    def _dense(self) -> dict[str, TensorSpec]:
        seen: set[Any] = set()
        own = {name: id(tensor) for name, tensor in named_tensors(self.loaded.model)}
        found = {}
        stored = self.loaded.checkpoint.stored()
        for name, origin in self._names(stored):
            tensor = stored[origin.name]
            key = own.get(name, id(tensor)) if origin.name == name else name  # tied tensors are one object
            if key not in seen:
                seen.add(key)
                self._views[name] = origin
                found[name] = TensorSpec(tuple(origin.view(tensor).shape), tensor.dtype)
        return found

    def _names(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, SourceView]]:
        """Specs of all stored tensors that are not weights of nested layers."""
        pieces: dict[str, list[tuple[str, SourceView]]] = {}
        for name, origin in self.origins.items():
            if origin.expert is not None:
                pieces.setdefault(origin.name, []).append((name, origin))
        opened = {_owner(o.name) for n, o in self.origins.items() if o.expert is not None and _owner(n) in self.layers}
        for name in stored:
            if _owner(name) in opened and name in pieces:
                yield from ((piece, origin) for piece, origin in pieces[name] if not self._nested(piece))
            elif not self._nested(name):
                yield name, SourceView(name)

    def _nested(self, name: str) -> bool:
        return name.endswith(".weight") and _owner(name) in self.layers


def _check_transform(blocks: BlockModel, parent: Parent) -> None:
    """Raise ValueError unless the other weights pass the same transform as the parent's."""
    if blocks.transform_description != parent.transform:
        raise ValueError(
            f"the parent's weights passed the transform {parent.transform}, those of the model "
            f"{blocks.transform_description}"
        )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
