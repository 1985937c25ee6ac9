"""What a nested checkpoint says of itself: ``quantization_config`` in its ``config.json``, parsed and checked.

    {"quant_method": "matquant", "format_version": 1, "bits": 4, "max_bits": 8, "prefill_bits": null,
     "layer_bits": {LAYER: 3, ...},                                  an allocation; other layers have "bits"
     "master_bits": 8, "slicing": "msb", "offset": 8.0, "zeros": false, "group_size": 128, "scale_dtype": "float16",
     "layers": {LAYER: {"shape": [out, in], and what differs from the line above}, ...},
     "modules_to_not_convert": ["lm_head", ...],
     "plane_indices": [2, 3, ...],             for so many planes there is an index of the files that hold them
     "files": {NAME: {"bytes": N, "sha256": "..."}, ...},
     "seal": "..."}

A layer X is stored as ``X.plane0`` .. ``X.plane{k-1}``, ``X.scales`` and perhaps ``X.zeros``, in the order of
``formats.tile_layout``. The seal is a hash of all but the widths that a user may choose (``bits``, ``layer_bits``,
``prefill_bits``), so that a damaged number is noticed where nothing else would.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from matquant.errors import UserError
from matquant.formats.bits import BIT_WIDTHS, MAX_BITS, MIN_BITS
from matquant.formats.nested import NestedWeight, Slicing, WeightFormat
from matquant.formats.planes import group_count
from matquant.formats.tile_layout import tiles
from matquant.store.files import FileRecord
from matquant.store.json_files import hash_json

QUANT_METHOD = "matquant"
FORMAT_VERSION = 1
# Named by config.json as what Transformers shall read: without this package it would fill the model with random numbers.
STOCK_INDEX = "import_matquant_first.safetensors.index.json"
CHOSEN = ("bits", "layer_bits", "prefill_bits")  # what the seal leaves out
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_DIFFERING = ("master_bits", "slicing", "offset", "zeros", "group_size", "scale_dtype")
_NAME = re.compile(r"\w+(\.\w+)*")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_LARGEST = 2**31  # features of a layer; more is damage


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Size and format of one nested layer."""

    out_features: int
    in_features: int
    format: WeightFormat

    @classmethod
    def of(cls, weight: NestedWeight) -> "LayerSpec":
        """That of a parent's layer."""
        rows, columns = weight.codes.shape
        return cls(out_features=rows, in_features=columns, format=weight.format)

    def planes(self, max_bits: int) -> int:
        """How many planes widths up to ``max_bits`` need."""
        return self.format.planes_read(min(max_bits, self.format.master_bits))

    def tensors(self, name: str, max_bits: int) -> dict[str, TensorSpec]:
        """What is stored of the layer ``name``: scales, zero points, then planes, the most significant first."""
        rows = tiles(self.out_features)
        side = (group_count(self.in_features, self.format.group_size), rows, 8, 4, 2)
        found = {f"{name}.scales": TensorSpec(side, self.format.scale_dtype)}
        if self.format.has_zero_points:
            found[f"{name}.zeros"] = TensorSpec(side, torch.uint8)
        plane = TensorSpec((rows, tiles(self.in_features), 32, 4), torch.int32)
        return found | {f"{name}.plane{d}": plane for d in range(self.planes(max_bits))}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NestedSpec:
    """A nested checkpoint.

    Attributes:
        layers: by full name.
        bits: the width of a reader that is not told another one.
        layer_bits: an allocation by layer, where the checkpoint has one; other layers have ``bits``.
        prefill_bits: the width for many tokens; None for the same.
        max_bits: the largest width that the stored planes allow.
        modules_to_not_convert: linear layers that are stored as they were.
        plane_indices: numbers of planes for which ``index_name`` is there.
        files: what the bytes of the weight files must be; empty when nobody recorded it.
    """

    layers: Mapping[str, LayerSpec]
    bits: int
    max_bits: int
    layer_bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prefill_bits: int | None = None
    modules_to_not_convert: Sequence[str] = ()
    plane_indices: Sequence[int] = ()
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    def width(self, layer: str) -> int:
        """The width that a layer begins with."""
        return self.layer_bits.get(layer, self.bits)

    def tensors(self, max_bits: int | None = None) -> dict[str, TensorSpec]:
        """What is stored of all nested layers, by name; with ``max_bits`` only the planes that widths up to it need."""
        most = self.max_bits if max_bits is None else min(max_bits, self.max_bits)
        return {n: t for name, layer in self.layers.items() for n, t in layer.tensors(name, most).items()}

    def to_json(self) -> dict[str, Any]:
        """The content of ``quantization_config``, with its seal."""
        common, layers = _compact(self.layers)
        content = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
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
    """The index of the files that hold the first so many planes, and all else."""
    return f"model.planes{planes}.safetensors.index.json"


def check_bits(value: Any, where: str, max_bits: int) -> int:
    """A width of a checkpoint. Raises UserError."""
    if type(value) is not int or value not in BIT_WIDTHS:
        raise UserError(
            f"{where}: a width is a whole number in {BIT_WIDTHS.start}..{BIT_WIDTHS[-1]}; found {_short(value)}."
        )
    if value > max_bits:
        raise UserError(f"{where}: {value} bits are not in this checkpoint, whose planes allow {max_bits}. Give fewer.")
    return value


def parse(content: Any, where: str = "quantization_config") -> NestedSpec:
    """The checked form of ``quantization_config``.

    Raises:
        UserError: it is of another method or version, or damaged; names the field, and what was found.
    """
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{where} is none of {QUANT_METHOD}: {_short(content)}.")
    if (version := content.get("format_version")) != FORMAT_VERSION or type(version) is not int:
        raise UserError(
            f"{where}: format_version {_short(version)} is not known; this version of matquant reads {FORMAT_VERSION}. "
            "A newer one may read it: pip install --upgrade matquant."
        )
    fields = _Fields(content, where)
    layers = _layers(fields)
    max_bits = check_bits(
        fields.take("max_bits"), f"{where}.max_bits", max(s.format.master_bits for s in layers.values())
    )
    widths = _Fields({"layer_bits": {}, "prefill_bits": None} | dict(content), where)
    allocation = widths.mapping("layer_bits")
    if unknown := [name for name in allocation if name not in layers]:
        raise UserError(f"{where}.layer_bits gives a width to {_short(unknown[0])}, which is no nested layer.")
    prefill = widths.take("prefill_bits")
    spec = NestedSpec(
        layers=layers,
        bits=check_bits(fields.take("bits"), f"{where}.bits", max_bits),
        max_bits=max_bits,
        layer_bits={n: check_bits(b, f"{where}.layer_bits.{n}", max_bits) for n, b in allocation.items()},
        prefill_bits=None if prefill is None else check_bits(prefill, f"{where}.prefill_bits", max_bits),
        modules_to_not_convert=tuple(fields.names("modules_to_not_convert")),
        plane_indices=tuple(fields.numbers("plane_indices")),
        files=_files(fields),
    )
    if content.get("seal") != _seal(content):
        raise UserError(
            f"{where} does not match its seal: it is damaged, or was edited. Only {', '.join(CHOSEN)} may be changed by "
            "hand; for anything else pack the model again."
        )
    return spec


class _Fields:
    """Takes typed values from a mapping that may be hostile; every method raises UserError."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def take(self, name: str) -> Any:
        if name not in self.content:
            raise UserError(f"{self.where} has no {name}. Copy or download the checkpoint's config.json again.")
        return self.content[name]

    def wrong(self, name: str, wanted: str) -> UserError:
        return UserError(f"{self.where}.{name} must be {wanted}; found {_short(self.content.get(name))}.")

    def whole(self, name: str, least: int, most: int) -> int:
        value = self.take(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"a whole number in {least}..{most}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.wrong(name, "a mapping by name")
        return dict(value)

    def names(self, name: str) -> list[str]:
        value = self.take(name)
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) and _NAME.fullmatch(v) for v in value):
            raise self.wrong(name, "a list of names of modules")
        return list(value)

    def numbers(self, name: str) -> list[int]:
        value = self.take(name)
        if not isinstance(value, list | tuple) or not all(type(v) is int and 1 <= v <= BIT_WIDTHS[-1] for v in value):
            raise self.wrong(name, f"a list of whole numbers in 1..{BIT_WIDTHS[-1]}")
        return list(value)


def _layers(fields: _Fields) -> dict[str, LayerSpec]:
    common = {key: fields.take(key) for key in _DIFFERING}
    found = {}
    for name, own in fields.mapping("layers").items():
        where = f"{fields.where}.layers.{name}"
        if not _NAME.fullmatch(name) or not isinstance(own, Mapping):
            raise UserError(f"{where} is no layer: {_short(own)}.")
        if unknown := own.keys() - {"shape", *_DIFFERING}:
            raise UserError(f"{where} has a field that is not known: {_short(sorted(unknown, key=str)[0])}.")
        found[name] = _layer(_Fields(common | dict(own), where))
    if not found:
        raise fields.wrong("layers", "a mapping with at least one layer")
    return found


def _layer(fields: _Fields) -> LayerSpec:
    shape = fields.take("shape")
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST for size in sizes):
        raise fields.wrong("shape", "two whole numbers, [out_features, in_features]")
    rows, columns = sizes
    size = columns if fields.take("group_size") == -1 else fields.whole("group_size", 1, _LARGEST)
    if columns % size:
        raise fields.wrong("group_size", f"-1 or a divisor of the {columns} input features")
    offset, slicing, zeros = fields.take("offset"), fields.take("slicing"), fields.take("zeros")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise fields.wrong("offset", "a number")
    if not isinstance(slicing, str) or slicing not in ("msb", "round"):
        raise fields.wrong("slicing", "msb or round")
    if type(zeros) is not bool:
        raise fields.wrong("zeros", "true or false")
    dtype = fields.take("scale_dtype")
    if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
        raise fields.wrong("scale_dtype", f"one of {', '.join(SCALE_DTYPES)}")
    fmt = WeightFormat(
        group_size=size,
        slicing=cast(Slicing, slicing),
        zero_point_offset=float(offset),
        has_zero_points=zeros,
        master_bits=fields.whole("master_bits", MIN_BITS, MAX_BITS),
        scale_dtype=SCALE_DTYPES[dtype],
    )
    return LayerSpec(out_features=rows, in_features=columns, format=fmt)


def _files(fields: _Fields) -> dict[str, FileRecord]:
    found = {}
    for name, record in fields.mapping("files").items():
        try:
            if not _FILE.fullmatch(name) or not name.endswith(".safetensors"):
                raise ValueError(f"{_short(name)} is no safetensors file inside the folder")
            found[name] = FileRecord.parse(record)
        except ValueError as error:
            raise UserError(f"{fields.where}.files: {error}.") from None
    return found


def _compact(layers: Mapping[str, LayerSpec]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What most layers have, and for each layer its shape and what differs."""
    plain = {
        name: {
            "master_bits": s.format.master_bits,
            "slicing": s.format.slicing,
            "offset": s.format.zero_point_offset,
            "zeros": s.format.has_zero_points,
            "group_size": -1 if s.format.group_size == s.in_features else s.format.group_size,
            "scale_dtype": str(s.format.scale_dtype).removeprefix("torch."),
        }
        for name, s in layers.items()
    }
    common = {key: Counter(p[key] for p in plain.values()).most_common(1)[0][0] for key in _DIFFERING}
    own = {
        name: {"shape": [s.out_features, s.in_features]} | {k: v for k, v in plain[name].items() if v != common[k]}
        for name, s in layers.items()
    }
    return common, own


def _seal(content: Mapping[str, Any]) -> str | None:
    """None for what cannot be written as JSON, and so matches no seal."""
    try:
        return hash_json({key: value for key, value in content.items() if key not in (*CHOSEN, "seal")})
    except (ValueError, TypeError, RecursionError):
        return None


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
