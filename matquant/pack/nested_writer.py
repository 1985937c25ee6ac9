"""Writes the nested checkpoint: planes in the order in which a reader may stop reading.

    model-00001-of-N  scales, zero points and the first two planes of all layers, then everything that is not quantized
    model-00002-of-N  plane 2
    ...               one plane each; sections that exceed the size of a file have several

``model.safetensors.index.json`` names them all, and ``model.planes3.safetensors.index.json`` those that a reader of
the first three planes needs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from matquant.formats.packed import NestedSpec, TensorSpec, index_name
from matquant.formats.planes import NestedPlanes
from matquant.formats.shard_index import INDEX
from matquant.pack.pack_input import PackInput
from matquant.pack.shards import Section, ShardWriter, aligned

_FIRST = 2  # planes that are in the first section: no width needs fewer


def write(
    source: PackInput,
    folder: Path,
    *,
    bits: int | Mapping[str, int],
    prefill_bits: int | None = None,
    max_bits: int,
    limit: int,
    progress: Callable[[int], None] = lambda _: None,
) -> NestedSpec:
    """Write the weight files and their indices.

    Args:
        folder: an empty one.
        bits: what a reader begins with: a width, or one for each layer.
        prefill_bits: its width for many tokens; None for the same.
        max_bits: the planes that widths up to this one need are written.
        limit: bytes of a file.
        progress: called with 1 after each layer.

    Returns:
        What the config has to say of it.

    Raises:
        UserError: the disk is full, or a file cannot be read.
    """
    dense = aligned(source.dense)
    sections = _sections(source, dense, max_bits)
    planes = list(range(_FIRST, len(sections) + 1))
    with ShardWriter(folder, sections, limit) as files:
        for name, weight in source.weights():
            packed = NestedPlanes.pack(weight, min(max_bits, weight.format.master_bits))
            files.write(f"{name}.scales", packed.scales)
            if packed.zeros is not None:
                files.write(f"{name}.zeros", packed.zeros)
            for d, plane in enumerate(packed.planes):
                files.write(f"{name}.plane{d}", plane)
            progress(1)
        for name in dense:
            files.write(name, source.read(name))
        files.write_index(INDEX)
        for count in planes:
            files.write_index(index_name(count), count - _FIRST + 1)
    widths = {} if isinstance(bits, int) else dict(bits)
    return NestedSpec(
        layers=source.layers,
        bits=bits if isinstance(bits, int) else max(widths.values()),
        max_bits=max_bits,
        layer_bits=widths,
        prefill_bits=prefill_bits,
        modules_to_not_convert=source.unconverted,
        plane_indices=planes,
        files=files.records,
    )


def _sections(source: PackInput, dense: Section, max_bits: int) -> list[dict[str, TensorSpec]]:
    """Sections of the checkpoint: first the planes and tensors that every reader needs, then one section per further plane."""
    sections: list[dict[str, TensorSpec]] = [{}]
    for name, layer in source.layers.items():
        for tensor, spec in layer.tensors(name, max_bits).items():
            _, _, number = tensor.rpartition(".plane")
            place = max(0, int(number) - _FIRST + 1) if tensor == f"{name}.plane{number}" else 0
            sections += [{} for _ in range(place + 1 - len(sections))]
            sections[place][tensor] = spec
    sections[0] |= dense
    return sections
