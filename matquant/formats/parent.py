"""Parent artifact: one safetensors file per decoder block, with the meaning of its tensors in the header.

Tensors are ``<layer>.codes``, ``<layer>.scales``, ``<layer>.zeros`` and, for each bit-width b with scales of its own,
``<layer>.scales<b>``, see ``formats.nested.NestedWeight``. The metadata entry ``matquant`` of the header is JSON. It holds for
each layer its master bits, slicing, zero-point offset, shape, relative error at each bit-width and, where they differ from
those of a plain layer, the bit-widths with scales of their own, the stretch of later planes, and the group size (if the last
group of a row is shorter than the others).
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.store import Artifact
from matquant.store.distributed_store import DraftLike

TRANSFORM_KEY = "matquant_transform"  # entry of a model's config that describes the transform of its weights


def block_file(index: int) -> str:
    """File name of a block."""
    return f"block-{index:04d}.safetensors"


def write_block(draft: DraftLike, name: str, weights: dict[str, NestedWeight], record: dict[str, Any]) -> None:
    """Write and commit one block.

    Args:
        weights: quantized layers by full name.
        record: JSON object stored in the header, with an entry in ``layers`` for each layer; ``read_block`` returns it.
    """
    tensors = {f"{layer}.{part}": t for layer, weight in weights.items() for part, t in weight.tensors().items()}
    layers = {layer: record["layers"][layer] | _format_record(weight) for layer, weight in weights.items()}
    header = json.dumps(record | {"layers": layers}, sort_keys=True, allow_nan=False)
    draft.write_tensors(name, tensors, {"matquant": header})


def read_block(source: DraftLike | Artifact, name: str) -> tuple[dict[str, NestedWeight], dict[str, Any]]:
    """Read the layers of one block by full name, and the record of its header.

    Raises:
        UserError: the file is damaged, or its header does not describe its tensors.
    """
    tensors, metadata = source.read_tensors(name)
    try:
        record = json.loads(metadata["matquant"])
        weights = {
            layer: NestedWeight(
                codes=tensors[f"{layer}.codes"],
                scales=tensors[f"{layer}.scales"],
                zeros=tensors.get(f"{layer}.zeros"),
                own_scales={bits: tensors[f"{layer}.scales{bits}"] for bits in about.get("scale_bits", ())},
                format=_format_of(tensors, layer, about),
            )
            for layer, about in record["layers"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name} is no block of a parent: {error}. Delete the folder of the artifact; the next run makes it again."
        ) from error
    return weights, record


def _format_record(weight: NestedWeight) -> dict[str, Any]:
    """Format of a layer as far as its tensors do not show it; ``group_size`` only if the last group of a row is shorter."""
    group_size, master_bits, slicing, offset, stretch = weight.format.op_args
    record: dict[str, Any] = {"master_bits": master_bits, "slicing": slicing, "offset": offset}
    if weight.format.scale_bits:
        record["scale_bits"] = list(weight.format.scale_bits)
    if stretch != 1:
        record["stretch"] = stretch
    return record | ({"group_size": group_size} if weight.codes.shape[1] % group_size else {})


def _format_of(tensors: Mapping[str, Tensor], layer: str, about: Mapping[str, Any]) -> WeightFormat:
    """Format of a layer from its tensors and ``_format_record``."""
    scales = tensors[f"{layer}.scales"]
    return WeightFormat(
        group_size=about.get("group_size", _equal_group_size(tensors, layer)),
        master_bits=about["master_bits"],
        slicing=about["slicing"],
        zero_point_offset=about["offset"],
        has_zero_points=f"{layer}.zeros" in tensors,
        scale_dtype=scales.dtype,
        scale_bits=tuple(about.get("scale_bits", ())),
        stretch=about.get("stretch", 1.0),
    )


def _equal_group_size(tensors: Mapping[str, Tensor], layer: str) -> int:
    """Input features per scale where all groups are equal, from the shapes of codes and scales."""
    return tensors[f"{layer}.codes"].shape[1] // tensors[f"{layer}.scales"].shape[1]


class Parent:
    """Finished parent, read block by block.

    Attributes:
        artifact: folder in the store.
        blocks: record of each block, from the manifest.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.blocks: list[dict[str, Any]] = artifact.about["blocks"]
        self._last: tuple[int, dict[str, NestedWeight]] = (-1, {})

    @property
    def transform(self) -> dict[str, Any] | None:
        """Description of the transform that the weights passed before quantization; None without one."""
        return self.artifact.about.get("transform")

    def block(self, index: int) -> dict[str, NestedWeight]:
        """Quantized layers of one block by full name. The most recent block is cached."""
        if self._last[0] != index:
            self._last = (index, read_block(self.artifact, self.blocks[index]["file"])[0])
        return self._last[1]

    def bytes_read(self, bits: int) -> int:
        """Bytes that a runtime reads for all quantized layers at ``bits`` bits."""
        return sum(w.bytes_read(bits) for i in range(len(self.blocks)) for w in self.block(i).values())

    def layer_errors(self) -> list[dict[str, Any]]:
        """Row per layer for the results: name, block, parameters and relative error at each bit-width."""
        rows = []
        for index, block in enumerate(self.blocks):
            for name, layer in block["layers"].items():
                out_features, in_features = layer["shape"]
                size = out_features * in_features
                rows.append({"name": name, "block": index, "parameters": size, "error": layer["errors"]})
        return rows

    def undersampled_experts(self) -> list[dict[str, Any]]:
        """Expert layers with fewer calibration tokens than input features: ``name``, ``tokens``, ``inputs``.

        Their Hessians were completed with the mean Hessian of all experts of the block.
        """
        return [row for block in self.blocks for row in block.get("experts", [])]

    def notes(self) -> list[str]:
        """Notes that quantization recorded, over all blocks."""
        return [note for block in self.blocks for note in block["notes"]]
