"""Nested checkpoint: ``quantization_config`` in its ``config.json``, parsed and checked.

    {"quant_method": "matquant", "format_version": 2, "bits": 4, "max_bits": 8, "prefill_bits": null,
     "layer_bits": {LAYER: 3, ...},                    an allocation; all other layers have "bits"
     "master_bits": 8, "slicing": "msb", "offset": 8.0, "zeros": false, "group_size": 128, "scale_dtype": "float16",
     "scale_bits": [2, 3, 4], "stretch": 1.25,         see ``formats.nested``; both from format version 2 on
     "layers": {LAYER: {"shape": [out, in], and the fields that differ from the line above}, ...},
     "modules_to_not_convert": ["lm_head", ...],
     "plane_indices": [2, 3, ...],                     numbers of planes for which there is an index of the files
     "files": {NAME: {"bytes": N, "sha256": "..."}, ...},
     "seal": "..."}

A layer X is stored as ``X.plane0`` .. ``X.plane{k-1}``, ``X.scales``, ``X.scales{b}`` for each b in ``scale_bits`` up to
``max_bits`` and, with zero points, ``X.zeros``, in the layout of ``formats.tile_layout``. The seal is a hash of all fields but
those that a user may edit (``bits``, ``layer_bits``, ``prefill_bits``), so that a damaged number is detected that no other
check would find.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS, STRETCHES, check_bits
from matquant.formats.field_reader import MODULE_NAME, FieldReader, short_json
from matquant.formats.groups import WHOLE_ROW, group_count
from matquant.formats.nested import SCALE_DTYPES, NestedWeight, Slicing, WeightFormat
from matquant.formats.tile_layout import group_shape, plane_shape
from matquant.store.files import FileRecord
from matquant.store.json_files import hash_json

QUANT_METHOD = "matquant"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)
# Index that config.json names for Transformers. The file does not exist, so that loading without this package fails instead
# of filling the model with random numbers.
STOCK_INDEX = "import_matquant_first.safetensors.index.json"
UNSEALED_FIELDS = ("bits", "layer_bits", "prefill_bits")

_FORMAT_FIELDS = ("master_bits", "slicing", "offset", "zeros", "group_size", "scale_dtype", "scale_bits", "stretch")
_LATER_FIELDS: dict[str, Any] = {
    "layer_bits": {},
    "prefill_bits": None,
    "scale_bits": [],
    "stretch": 1.0,
}  # absent from earlier folders
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_MAX_FEATURES = 2**31  # larger numbers are damage


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Size and format of one nested layer."""

    out_features: int
    in_features: int
    format: WeightFormat

    @classmethod
    def from_weight(cls, weight: NestedWeight) -> "LayerSpec":
        """Specification of a layer of a parent."""
        rows, columns = weight.codes.shape
        return cls(out_features=rows, in_features=columns, format=weight.format)

    def plane_count(self, max_bits: int) -> int:
        """Number of planes that bit-widths up to ``max_bits`` read."""
        return self.format.planes_read(min(max_bits, self.format.master_bits))

    @property
    def has_equal_groups(self) -> bool:
        """True if the last group of a row is as long as the others."""
        return self.in_features % self.format.group_size == 0

    @property
    def parent_bytes(self) -> int:
        """Bytes of the layer in a parent: 8-bit codes, scales and zero points."""
        groups = self.out_features * group_count(self.in_features, self.format.group_size)
        return self.out_features * self.in_features + groups * self._group_bytes(self.format.master_bits)

    def packed_bytes(self, planes: int) -> int:
        """Bytes of the layer in packed form with its first ``planes`` planes, padding included."""
        plane = TensorSpec(plane_shape(self.out_features, self.in_features), torch.int32)
        side = math.prod(group_shape(self.out_features, self.in_features, self.format.group_size))
        return planes * plane.nbytes + side * self._group_bytes(planes)

    def _group_bytes(self, planes: int) -> int:
        """Bytes of the parameters of one group that go with so many planes: its scales, and its zero point."""
        sets = 1 + len(self.format.scale_bits_within(planes))
        return sets * self.format.scale_dtype.itemsize + self.format.has_zero_points

    def tensors(self, name: str, max_bits: int) -> dict[str, TensorSpec]:
        """Stored tensors of the layer ``name``: scales, zero points, then planes, most significant first."""
        side = group_shape(self.out_features, self.in_features, self.format.group_size)
        sets = ["", *self.format.scale_bits_within(self.plane_count(max_bits))]
        found = {f"{name}.scales{bits}": TensorSpec(side, self.format.scale_dtype) for bits in sets}
        if self.format.has_zero_points:
            found[f"{name}.zeros"] = TensorSpec(side, torch.uint8)
        plane = TensorSpec(plane_shape(self.out_features, self.in_features), torch.int32)
        return found | {f"{name}.plane{d}": plane for d in range(self.plane_count(max_bits))}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedSpec:
    """Description of a nested checkpoint.

    Attributes:
        layers: nested layers by full name.
        bits: default bit-width of a reader.
        layer_bits: default bit-width by layer, if the checkpoint has an allocation; all other layers have ``bits``.
        prefill_bits: default bit-width of forward passes that read prompts; None for that of decoding.
        max_bits: largest bit-width that the stored planes hold.
        modules_to_not_convert: linear layers that are stored dense.
        plane_indices: numbers of planes for which there is a file ``index_name``.
        files: size and SHA-256 of the weight files; empty if they were not recorded.
    """

    layers: Mapping[str, LayerSpec]
    bits: int
    max_bits: int
    layer_bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefill_bits: int | None = None
    modules_to_not_convert: Sequence[str] = ()
    plane_indices: Sequence[int] = ()
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    def bits_of(self, layer: str) -> int:
        """Default bit-width of one layer."""
        return self.layer_bits.get(layer, self.bits)

    def tensors(self, max_bits: int | None = None) -> dict[str, TensorSpec]:
        """Stored tensors of all nested layers by name, with the planes that bit-widths up to ``max_bits`` read."""
        top = self.max_bits if max_bits is None else min(max_bits, self.max_bits)
        return {n: t for name, layer in self.layers.items() for n, t in layer.tensors(name, top).items()}

    def to_json(self) -> dict[str, Any]:
        """Content of ``quantization_config``, with its seal."""
        common, layers = _compact_formats(self.layers)
        version = FORMAT_VERSION
        if not any(layer.format.scale_bits or layer.format.stretch != 1 for layer in self.layers.values()):
            version = 1  # readers of the first version understand the folder
            del common["scale_bits"], common["stretch"]
        content = {
            "quant_method": QUANT_METHOD,
            "format_version": version,
            "bits": self.bits,
            "layer_bits": dict(self.layer_bits),
            "prefill_bits": self.prefill_bits,
            "max_bits": self.max_bits,
            **common,
            "layers": layers,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "plane_indices": list(self.plane_indices),
            "files": {name: record.to_json() for name, record in sorted(self.files.items())},
        }
        return content | {"seal": _seal(content)}


def index_name(planes: int) -> str:
    """Name of the index of the files that hold the first ``planes`` planes and all other tensors."""
    return f"model.planes{planes}.safetensors.index.json"


def parse_nested_config(content: Any, where: str = "quantization_config") -> NestedSpec:
    """Parse and check the ``quantization_config`` of a nested checkpoint.

    Raises:
        UserError: the content has another method or version, or is damaged. Names the field and the value found.
    """
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{where} has no quant_method {QUANT_METHOD!r}; found {short_json(content)}.")
    if (version := content.get("format_version")) not in _READABLE_VERSIONS or type(version) is not int:
        raise UserError(
            f"{where}: format_version {short_json(version)} is not known; this version of matquant reads "
            f"{', '.join(map(str, _READABLE_VERSIONS))}. "
            "A newer one may read it: pip install --upgrade matquant."
        )
    fields = FieldReader(_LATER_FIELDS | dict(content), where)
    layers = _parse_layers(fields)
    master_bits = max(layer.format.master_bits for layer in layers.values())
    max_bits = check_bits(fields.take("max_bits"), f"{where}.max_bits", master_bits)
    spec = NestedSpec(
        layers=layers,
        bits=check_bits(fields.take("bits"), f"{where}.bits", max_bits),
        max_bits=max_bits,
        layer_bits=_parse_layer_bits(fields, layers, max_bits),
        prefill_bits=_parse_prefill_bits(fields, max_bits),
        modules_to_not_convert=tuple(fields.names("modules_to_not_convert")),
        plane_indices=tuple(fields.integers("plane_indices", 1, MAX_BITS)),
        files=_parse_files(fields),
    )
    if content.get("seal") != _seal(content):
        raise UserError(
            f"{where} does not match its seal: it was damaged or edited. Only {', '.join(UNSEALED_FIELDS)} may be edited; "
            "for anything else pack the model again."
        )
    return spec


def _parse_layer_bits(fields: FieldReader, layers: Mapping[str, LayerSpec], max_bits: int) -> dict[str, int]:
    allocation = fields.mapping("layer_bits")
    if unknown := [name for name in allocation if name not in layers]:
        raise UserError(f"{fields.where}.layer_bits names {short_json(unknown[0])}, which is no nested layer.")
    return {n: check_bits(bits, f"{fields.where}.layer_bits.{n}", max_bits) for n, bits in allocation.items()}


def _parse_prefill_bits(fields: FieldReader, max_bits: int) -> int | None:
    bits = fields.take("prefill_bits")
    return None if bits is None else check_bits(bits, f"{fields.where}.prefill_bits", max_bits)


def _parse_layers(fields: FieldReader) -> dict[str, LayerSpec]:
    common = {key: fields.take(key) for key in _FORMAT_FIELDS}
    found = {}
    for name, own in fields.mapping("layers").items():
        where = f"{fields.where}.layers.{name}"
        if not MODULE_NAME.fullmatch(name) or not isinstance(own, Mapping):
            raise UserError(f"{where} is no layer: {short_json(own)}.")
        if unknown := own.keys() - {"shape", *_FORMAT_FIELDS}:
            raise UserError(f"{where} has an unknown field: {short_json(min(unknown, key=str))}.")
        found[name] = _parse_layer(FieldReader(common | dict(own), where))
    if not found:
        raise fields.wrong("layers", "a mapping with at least one layer")
    return found


def _parse_layer(fields: FieldReader) -> LayerSpec:
    shape = fields.take("shape")
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _MAX_FEATURES for size in sizes):
        raise fields.wrong("shape", "two whole numbers, [out_features, in_features]")
    rows, columns = sizes
    return LayerSpec(out_features=rows, in_features=columns, format=_parse_format(fields, columns))


def _parse_format(fields: FieldReader, in_features: int) -> WeightFormat:
    size = in_features if fields.take("group_size") == WHOLE_ROW else fields.integer("group_size", 1, _MAX_FEATURES)
    if size > in_features:
        raise fields.wrong("group_size", f"-1 or at most the {in_features} input features")
    offset, slicing, zeros = fields.take("offset"), fields.take("slicing"), fields.take("zeros")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise fields.wrong("offset", "a finite number")
    if not isinstance(slicing, str) or slicing not in ("msb", "round"):
        raise fields.wrong("slicing", "msb or round")
    if type(zeros) is not bool:
        raise fields.wrong("zeros", "true or false")
    dtype = fields.take("scale_dtype")
    if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
        raise fields.wrong("scale_dtype", f"one of {', '.join(SCALE_DTYPES)}")
    stretch = fields.take("stretch")
    allowed = STRETCHES if slicing == "msb" else STRETCHES[:1]
    if type(stretch) not in (int, float) or stretch not in allowed:
        raise fields.wrong("stretch", f"one of {', '.join(map(str, allowed))}")
    return WeightFormat(
        group_size=size,
        master_bits=fields.integer("master_bits", MIN_BITS, MAX_BITS),
        slicing=cast(Slicing, slicing),
        zero_point_offset=float(offset),
        has_zero_points=zeros,
        scale_dtype=SCALE_DTYPES[dtype],
        scale_bits=_parse_scale_bits(fields),
        stretch=float(stretch),
    )


def _parse_scale_bits(fields: FieldReader) -> tuple[int, ...]:
    found = tuple(fields.integers("scale_bits", MIN_BITS, MAX_BITS))
    if list(found) != sorted(set(found)):
        raise fields.wrong("scale_bits", "ascending bit-widths, each once")
    return found


def _parse_files(fields: FieldReader) -> dict[str, FileRecord]:
    found = {}
    for name, record in fields.mapping("files").items():
        try:
            if not _FILE_NAME.fullmatch(name) or not name.endswith(".safetensors"):
                raise ValueError(f"{short_json(name)} is no safetensors file inside the folder")
            found[name] = FileRecord.parse(record)
        except ValueError as error:
            raise UserError(f"{fields.where}.files: {error}.") from None
    return found


def _compact_formats(layers: Mapping[str, LayerSpec]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Format fields that most layers share, and for each layer its shape and the fields that differ."""
    plain = {name: _format_fields(layer) for name, layer in layers.items()}
    common = {key: _most_common([p[key] for p in plain.values()]) for key in _FORMAT_FIELDS}
    own = {
        name: {"shape": [s.out_features, s.in_features]} | {k: v for k, v in plain[name].items() if v != common[k]}
        for name, s in layers.items()
    }
    return common, own


def _most_common(values: Sequence[Any]) -> Any:
    """Most frequent value, the first of equally frequent ones; values may be lists."""
    counts = Counter(map(hash_json, values))
    return max(values, key=lambda value: counts[hash_json(value)])


def _format_fields(layer: LayerSpec) -> dict[str, Any]:
    fmt = layer.format
    return {
        "master_bits": fmt.master_bits,
        "slicing": fmt.slicing,
        "offset": fmt.zero_point_offset,
        "zeros": fmt.has_zero_points,
        "group_size": WHOLE_ROW if fmt.group_size == layer.in_features else fmt.group_size,
        "scale_dtype": str(fmt.scale_dtype).removeprefix("torch."),
        "scale_bits": list(fmt.scale_bits),
        "stretch": fmt.stretch,
    }


def _seal(content: Mapping[str, Any]) -> str | None:
    """Hash of the sealed fields; None, which matches no seal, if they have no JSON form."""
    try:
        return hash_json({key: value for key, value in content.items() if key not in (*UNSEALED_FIELDS, "seal")})
    except (ValueError, TypeError, RecursionError):
        return None
