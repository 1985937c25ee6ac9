"""Allocation: a bit-width for each quantized layer, in a file that a person can read and edit.

YAML holds the bit-widths under ``bits`` (``widths`` in files of older versions) and their origin above them; only ``bits`` is
required. The text format of MatGPTQ and EvoPress has one line ``layer: bits`` for each layer.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from matquant.errors import UserError, shorten
from matquant.formats.bits import MAX_BITS, MIN_BITS

YAML_SUFFIXES, TEXT_SUFFIXES = (".yaml", ".yml"), (".txt",)
SUFFIXES = YAML_SUFFIXES + TEXT_SUFFIXES

_KEY, _OLD_KEY = "bits", "widths"
_HEADER = (
    "# Bit-width of each layer. Edit them as you like; `python run.py bits=THIS_FILE` evaluates the edited file.\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Bit-width of each quantized layer of one model.

    Attributes:
        bits: bit-width by full layer name, in the order of the model.
        average_bits: mean weighted by parameters when the file was written; None if the file does not hold it.
        bytes: bytes that a runtime reads for the quantized layers, when the file was written; None likewise.
        about: other entries of the file: method, budget, predicted and measured loss, SHA-256 of the parent.
    """

    bits: Mapping[str, int]
    average_bits: float | None = None
    bytes: int | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def is_file_name(value: object) -> bool:
    """True if a value of the setting ``bits`` is the name of an allocation file."""
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)


def to_yaml(allocation: Allocation) -> str:
    """Content of the YAML file of an allocation."""
    tree = {"kind": "allocation", **allocation.about}
    tree |= {"average_bits": allocation.average_bits, "bytes": allocation.bytes, _KEY: dict(allocation.bits)}
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=200)
    return _HEADER + text


def to_text(allocation: Allocation) -> str:
    """Content of the text file of an allocation: one line ``layer: bits`` for each layer."""
    return "".join(f"{name}: {bits}\n" for name, bits in allocation.bits.items())


def read(path: Path) -> Allocation:
    """Read an allocation from a YAML or text file.

    Raises:
        UserError: the file is missing, unreadable or no allocation. Names the line or layer.
    """
    path = Path(path).expanduser()
    if not path.name.lower().endswith(SUFFIXES):
        raise UserError(f"The name of an allocation file must end with {', '.join(SUFFIXES)}; found {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no allocation at {path}. A search writes one into the folder of its run.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The allocation {path} cannot be read: {error}.") from None
    if path.name.lower().endswith(TEXT_SUFFIXES):
        return Allocation(bits=_parse_lines(text, path))
    return _parse_yaml(text, path)


def check_layers(allocation: Allocation, layers: Collection[str], master_bits: int, path: str) -> None:
    """Check that an allocation names exactly the layers of a parent, at bit-widths that the parent holds.

    Args:
        layers: names of the quantized layers of the parent.
        path: file of the allocation, for the message.

    Raises:
        UserError: names the first layers that are unknown or missing, or a layer with more than ``master_bits`` bits.
    """
    if unknown := [name for name in allocation.bits if name not in layers]:
        raise UserError(
            f"{path} names {len(unknown)} layers that this parent does not have: {shorten(unknown)}. Remove them, or use "
            "the allocation of this model."
        )
    if missing := [name for name in layers if name not in allocation.bits]:
        raise UserError(f"{path} has no bit-width for {shorten(missing)}. Add one for every quantized layer.")
    for name, bits in allocation.bits.items():
        if bits > master_bits:
            raise UserError(f"{path}: {name} has {bits} bits, but the parent has only {master_bits}. Choose fewer.")


def _parse_yaml(text: str, path: Path) -> Allocation:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The allocation {path} is no valid YAML: {' '.join(str(error).split())}.") from None
    keys = [key for key in (_KEY, _OLD_KEY) if isinstance(tree, dict) and key in tree]
    if len(keys) > 1:
        raise UserError(f"The allocation {path} has both '{_KEY}' and '{_OLD_KEY}'. Keep one of them.")
    by_layer = tree[keys[0]] if keys else None
    if not isinstance(by_layer, dict) or not by_layer:
        raise UserError(f"The allocation {path} has no mapping '{_KEY}' from layer names to bit-widths.")
    about = {key: value for key, value in tree.items() if key not in ("kind", *keys, "average_bits", "bytes")}
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"The allocation {path} has an entry that results.json cannot hold: {error}.") from None
    average, size = tree.get("average_bits"), tree.get("bytes")
    return Allocation(
        bits={str(name): _parse_bits(value, str(name), path) for name, value in by_layer.items()},
        average_bits=float(average) if isinstance(average, int | float) else None,
        bytes=size if isinstance(size, int) else None,
        about=about,
    )


def _parse_lines(text: str, path: Path) -> dict[str, int]:
    """Bit-widths from lines ``layer: bits``; empty lines and comments are skipped."""
    by_layer: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = (part.strip() for part in line.rpartition(":"))
        if not colon or not name:
            raise UserError(f"{path}, line {number}: expected 'layer: bits'; found {line.strip()!r}.")
        if name in by_layer:
            raise UserError(f"{path}, line {number}: {name} has a bit-width already. Remove one of the two lines.")
        by_layer[name] = _parse_bits(value, name, path)
    if not by_layer:
        raise UserError(f"The allocation {path} is empty. Write one line 'layer: bits' for each layer.")
    return by_layer


def _parse_bits(value: object, name: str, path: Path) -> int:
    """Bit-width from YAML or text; published files hold whole numbers, some of them written as 3.0."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    if not number.is_integer() or not MIN_BITS <= number <= MAX_BITS:
        raise UserError(f"{path}: {name} needs a bit-width of {MIN_BITS}..{MAX_BITS} bits; found {value!r}.")
    return int(number)
