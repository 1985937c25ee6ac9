"""Nested checkpoint: planes in the order in which a reader may stop reading.

    model-00001-of-N  scales, zero points and the first two planes of all layers, then everything that is not quantized
    model-00002-of-N  plane 2
    ...               one plane each; sections that exceed the size of a file have several

``model.safetensors.index.json`` names them all, and ``model.planes3.safetensors.index.json`` those that a reader of
the first three planes needs.
"""

from matquant.formats.packed import STOCK_INDEX, LayerSpec, NestedSpec, TensorSpec, index_name
from matquant.formats.planes import NestedPlanes
from matquant.formats.shard_index import INDEX
from matquant.pack.formats.base import CheckpointFormat, PackRequest, PackResult
from matquant.pack.pack_input import PackInput
from matquant.pack.shards import Section, ShardWriter, aligned

_FIRST = 2  # planes in the first section: the smallest bit-width


class NestedFormat(CheckpointFormat):
    """Parent of this project: one folder that is loaded at any bit-width."""

    name = "nested"

    def write(self, request: PackRequest) -> PackResult:
        spec = _write(request)
        return PackResult(
            quantization_config=spec.to_json(),
            # Null, so that from_pretrained(folder, bits=3) finds a setting of that name.
            config={"bits": None, "prefill_bits": None, "max_bits": None, "transformers_weights": STOCK_INDEX},
            record={"max_bits": spec.max_bits, "bits": request.bits if isinstance(request.bits, int) else "allocation"},
        )


def _write(request: PackRequest) -> NestedSpec:
    """Write the weight files and an index for each number of planes."""
    source, max_bits = request.source, request.max_bits
    dense = aligned(source.dense)
    sections = _sections(source, dense, max_bits)
    planes = list(range(_FIRST, len(sections) + 1))
    with ShardWriter(request.folder, sections, request.file_bytes) as files:
        for name, weight in source.weights():
            packed = NestedPlanes.pack(weight, min(max_bits, weight.format.master_bits))
            files.write(f"{name}.scales", packed.scales)
            for bits, scales in packed.own_scales.items():
                files.write(f"{name}.scales{bits}", scales)
            if packed.zeros is not None:
                files.write(f"{name}.zeros", packed.zeros)
            for d, plane in enumerate(packed.planes):
                files.write(f"{name}.plane{d}", plane)
            request.progress(1)
        for name in dense:
            files.write(name, source.read(name))
        files.write_index(INDEX)
        for count in planes:
            files.write_index(index_name(count), count - _FIRST + 1)
    by_layer = {} if isinstance(request.bits, int) else dict(request.bits)
    return NestedSpec(
        layers=source.layers,
        bits=request.bits if isinstance(request.bits, int) else max(by_layer.values()),
        max_bits=max_bits,
        layer_bits=by_layer,
        prefill_bits=request.prefill_bits,
        modules_to_not_convert=source.unconverted,
        plane_indices=planes,
        files=files.records,
    )


def _sections(source: PackInput, dense: Section, max_bits: int) -> list[dict[str, TensorSpec]]:
    """Sections of the checkpoint: first the planes and tensors that every reader needs, then one section per further plane."""
    sections: list[dict[str, TensorSpec]] = [{}]
    for name, layer in source.layers.items():
        for tensor, spec in layer.tensors(name, max_bits).items():
            place = _first_section(tensor.removeprefix(f"{name}."), layer)
            sections += [{} for _ in range(place + 1 - len(sections))]
            sections[place][tensor] = spec
    sections[0] |= dense
    return sections


def _first_section(part: str, layer: LayerSpec) -> int:
    """Number of further planes of the readers that need a tensor, by the last part of its name."""
    if part.startswith("plane"):
        return max(0, int(part.removeprefix("plane")) + 1 - _FIRST)
    bits = part.removeprefix("scales")
    return layer.plane_count(int(bits)) - _FIRST if bits.isdecimal() else 0
