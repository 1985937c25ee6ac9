"""Typed access to the fields of a JSON object that may be damaged or hostile."""

import json
import re
from collections.abc import Mapping
from typing import Any

from matquant.errors import UserError

MODULE_NAME = re.compile(r"\w+(\.\w+)*")


class FieldReader:
    """Reader of typed fields; every method raises UserError with the name and value of a field that is missing or wrong.

    Args:
        content: JSON object.
        where: path of the object in its file, for the messages.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def take(self, name: str) -> Any:
        """Value of any type."""
        if name not in self.content:
            raise UserError(f"{self.where} has no field {name!r}. Copy or download the checkpoint's config.json again.")
        return self.content[name]

    def wrong(self, name: str, wanted: str) -> UserError:
        """Error for a field whose value is not ``wanted``."""
        return UserError(f"{self.where}.{name} must be {wanted}; found {short_json(self.content.get(name))}.")

    def integer(self, name: str, minimum: int, maximum: int) -> int:
        """Whole number in a range, bounds included."""
        value = self.take(name)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(name, f"a whole number in {minimum}..{maximum}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """JSON object."""
        value = self.take(name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.wrong(name, "a mapping by name")
        return dict(value)

    def names(self, name: str) -> list[str]:
        """List of dotted module names."""
        value = self.take(name)
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, str) and MODULE_NAME.fullmatch(v) for v in value
        ):
            raise self.wrong(name, "a list of names of modules")
        return list(value)

    def integers(self, name: str, minimum: int, maximum: int) -> list[int]:
        """List of whole numbers in a range, bounds included."""
        value = self.take(name)
        if not isinstance(value, list | tuple) or not all(type(v) is int and minimum <= v <= maximum for v in value):
            raise self.wrong(name, f"a list of whole numbers in {minimum}..{maximum}")
        return list(value)


def short_json(value: Any, limit: int = 80) -> str:
    """JSON form of a value for an error message, cut to ``limit`` characters."""
    try:
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
