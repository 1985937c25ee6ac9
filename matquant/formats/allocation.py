"""An allocation: a width for each quantized layer, as a file that a person can read and edit.

YAML holds the widths under ``widths`` and, above them, where they come from; only ``widths`` is needed. The text format that
MatGPTQ and EvoPress publish has one line ``layer: bits`` for each layer and nothing else.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS

YAML_SUFFIXES, TEXT_SUFFIXES = (".yaml", ".yml"), (".txt",)
SUFFIXES = YAML_SUFFIXES + TEXT_SUFFIXES

_SHOWN = 3  # names in a sentence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """A width for each quantized layer of one model.

    Attributes:
        widths: bits by full layer name, in the order of the model.
        average_bits: by parameters, as it was when the file was written; None when it does not say.
        bytes: that a runtime reads for the quantized layers, likewise.
        about: what else the file says: method, budget, predicted and measured loss, the parent's SHA-256.
    """

    widths: Mapping[str, int]
    average_bits: float | None = None
    bytes: int | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def is_file_name(value: object) -> bool:
    """Whether a value of ``bits`` means an allocation's file and not a width."""
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)


def to_yaml(allocation: Allocation) -> str:
    """The YAML file of an allocation."""
    head = {"kind": "allocation", **allocation.about}
    head |= {"average_bits": allocation.average_bits, "bytes": allocation.bytes}
    text = yaml.safe_dump(head | {"widths": dict(allocation.widths)}, sort_keys=False, allow_unicode=True, width=200)
    return f"# A width for each layer. Edit them as you like; `python run.py bits=THIS_FILE` measures what stands here.\n{text}"


def to_text(allocation: Allocation) -> str:
    """The published text format: a line ``layer: bits`` for each layer."""
    return "".join(f"{name}: {bits}\n" for name, bits in allocation.widths.items())


def read(path: Path) -> Allocation:
    """The allocation in a YAML or text file.

    Raises:
        UserError: there is no such file, or it is no allocation; names the line or layer.
    """
    path = Path(path).expanduser()
    if not path.name.lower().endswith(SUFFIXES):
        raise UserError(f"An allocation's file ends with {', '.join(SUFFIXES)}; found {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no allocation at {path}. A search writes one into its run's folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The allocation {path} cannot be read: {error}.") from None
    if path.name.lower().endswith(TEXT_SUFFIXES):
        return Allocation(widths=_text_widths(text, path))
    return _from_yaml(text, path)


def check(allocation: Allocation, layers: Collection[str], master_bits: int, path: str) -> None:
    """Make sure that an allocation names the layers of a parent, all of them, at widths that it has.

    Raises:
        UserError: names the first layers that are unknown or missing, or a width that the parent lacks.
    """
    unknown = [name for name in allocation.widths if name not in layers]
    if unknown:
        raise UserError(f"{path} names layers that this parent does not have: {_some(unknown)}.")
    missing = [name for name in layers if name not in allocation.widths]
    if missing:
        raise UserError(f"{path} gives no width to {_some(missing)}; every quantized layer needs one.")
    for name, bits in allocation.widths.items():
        if bits > master_bits:
            raise UserError(f"{path}: {name} has {bits} bits, but the parent has only {master_bits}.")


def _from_yaml(text: str, path: Path) -> Allocation:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The allocation {path} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("widths"), dict) or not tree["widths"]:
        raise UserError(f"The allocation {path} has no mapping 'widths' from layer names to bits.")
    widths = {str(name): _bits(value, str(name), path) for name, value in tree["widths"].items()}
    about = {key: value for key, value in tree.items() if key not in ("kind", "widths", "average_bits", "bytes")}
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"The allocation {path} holds what results cannot: {error}.") from None
    average, size = tree.get("average_bits"), tree.get("bytes")
    return Allocation(
        widths=widths,
        average_bits=float(average) if isinstance(average, int | float) else None,
        bytes=size if isinstance(size, int) else None,
        about=about,
    )


def _text_widths(text: str, path: Path) -> dict[str, int]:
    widths: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.rpartition(":")
        if not colon or not name.strip():
            raise UserError(f"{path}, line {number}: expected 'layer: bits'; found {line.strip()!r}.")
        if name.strip() in widths:
            raise UserError(f"{path}, line {number}: {name.strip()} has a width already.")
        widths[name.strip()] = _bits(value.strip(), name.strip(), path)
    if not widths:
        raise UserError(f"The allocation {path} is empty; it needs a line 'layer: bits' for each layer.")
    return widths


def _bits(value: object, name: str, path: Path) -> int:
    """A width from YAML or text; the published files hold whole numbers, some of them written as 3.0."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    if not number.is_integer() or not MIN_BITS <= number <= MAX_BITS:
        raise UserError(f"{path}: {name} needs a width of {MIN_BITS}..{MAX_BITS} bits; found {value!r}.")
    return int(number)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
