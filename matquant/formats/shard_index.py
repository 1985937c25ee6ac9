"""The index of a sharded checkpoint, which may be hostile."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from matquant.errors import UserError

INDEX = "model.safetensors.index.json"


def index_names(folder: Path, index: str = INDEX) -> list[str]:
    """The files that an index names, sorted, all of them inside the folder; whether they exist is not looked at.

    Raises:
        UserError: the index is damaged, or names a file outside of the folder.
    """
    weights = read_json(folder / index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{folder / index} names no weights. Copy or download the checkpoint again.")
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        # Both kinds of slash, since the name may be read on either system.
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name or path.suffix != ".safetensors":
            raise UserError(
                f"{folder / index} names {name!r}, which is no safetensors file inside the folder. "
                "It is not safe to load: get the checkpoint from where you trust it."
            )
    return names


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no valid JSON: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object. Copy or download it again.")
    return content
