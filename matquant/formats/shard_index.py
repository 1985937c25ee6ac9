"""Index of a sharded checkpoint. Its content may be damaged or hostile."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from matquant.errors import UserError

INDEX = "model.safetensors.index.json"


def index_names(folder: Path, index: str = INDEX) -> list[str]:
    """Sorted names of the files in an index. The files themselves are not checked.

    Raises:
        UserError: the index is damaged, or names anything but a safetensors file inside the folder.
    """
    weights = read_json(folder / index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{folder / index} names no weights. Copy or download the checkpoint again.")
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        # A backslash is a separator on Windows only, but the check must hold on every system.
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name or path.suffix != ".safetensors":
            raise UserError(
                f"{folder / index} names {name!r}, which is no safetensors file inside the folder. "
                "It is not safe to load. Get the checkpoint from a source that you trust."
            )
    return names


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no valid JSON: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object. Copy or download it again.")
    return content
