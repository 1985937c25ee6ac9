"""Frozen dataclasses from plain mappings, with a sentence for every value that does not fit, and mappings of their defaults."""

import dataclasses
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from matquant.errors import UserError

TARGET = "_target_"  # key that names the class of a polymorphic group, as in hydra.utils.instantiate


def build(kind: Any, value: Any, where: str = "", renamed: Mapping[str, str] | None = None) -> Any:
    """Convert ``value`` to the type ``kind``.

    Args:
        kind: a dataclass, or the type of one of its fields.
        value: plain Python containers and scalars.
        where: dotted name of the value, for messages.
        renamed: new name of each setting that had another name before, both dotted.

    Raises:
        UserError: a key is missing or unknown, or a value has the wrong type.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(_target_class(typing.cast(type, kind), value, where), value, where, renamed or {})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, where, renamed)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} must be one of {', '.join(map(str, args))}; found {value!r}.")
        return value
    if origin is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(build(args[0], v, where, renamed) for v in values)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping; found {value!r}.")
        return {build(args[0], k, where): build(args[1], v, f"{where}.{k}", renamed) for k, v in value.items()}
    return _build_scalar(kind, value, where)


def defaults_of(kind: type) -> dict[str, Any]:
    """Defaults of a dataclass as plain containers; ``???`` marks a field without a default, as in OmegaConf."""
    plain = {}
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            plain[field.name] = _plain(field.default_factory())
        else:
            plain[field.name] = "???" if field.default is dataclasses.MISSING else _plain(field.default)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in dataclasses.asdict(value).items()}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _target_class(kind: type, value: Any, where: str) -> type:
    """Class that ``_target_`` names, a subclass of ``kind``; ``kind`` itself without ``_target_``."""
    if not isinstance(value, dict) or TARGET not in value:
        return kind
    from hydra.utils import get_class

    try:
        found = get_class(str(value[TARGET]))
    except Exception as error:  # whatever importing a user's module raises
        raise UserError(f"{where}.{TARGET}={value[TARGET]} cannot be imported: {error}.") from error
    if not issubclass(found, kind) or not dataclasses.is_dataclass(found):
        raise UserError(
            f"{where}.{TARGET}={value[TARGET]} is no {kind.__name__}. Name a dataclass that derives from it."
        )
    return found


def _build_dataclass(kind: type, value: Any, where: str, renamed: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'The config'} must be a group of settings; found {value!r}.")
    value = {key: part for key, part in value.items() if key != TARGET}
    fields = dataclasses.fields(kind)
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in {field.name for field in fields}}
    optional = {
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    prefix = f"{where}." if where else ""
    unknown, missing = value.keys() - hints.keys(), hints.keys() - value.keys() - optional
    if old := sorted(prefix + str(name) for name in unknown if prefix + str(name) in renamed):
        raise UserError(renamed_sentence(old[0], renamed))
    if unknown:
        names = ", ".join(prefix + str(n) for n in sorted(unknown, key=str))
        raise UserError(f"Unknown setting: {names}. Known settings: {', '.join(prefix + n for n in hints)}.")
    if missing:
        raise UserError(f"Missing setting: {', '.join(prefix + n for n in sorted(missing))}.")
    return kind(**{n: build(hint, value[n], prefix + n, renamed) for n, hint in hints.items() if n in value})


def renamed_sentence(old: str, renamed: Mapping[str, str]) -> str:
    """Sentence for a setting that has a new name."""
    return f"The setting {old} is called {renamed[old]} now. Use the new name."


def _build_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UserError(f"{where} must be {names.get(kind, kind.__name__)}; found {value!r}.")
    return value
